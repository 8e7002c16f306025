"""softmax(scale · q kᵀ | mask) v, computed in different ways. `naive` is the one to read first."""
