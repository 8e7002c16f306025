"""How a model's matrices lie in memory where it decodes on a CPU: applied from outside, as initialisation is."""

from model.linear import FanOut, Linear, read_fast
from model.transformer import TransformerLM


def lay_out_for_decoding(model: TransformerLM, rows: int = 1) -> None:
    """Store the matrices (out, in) that multiply on a CPU as a step of `rows` texts reads them fastest, and join those
    of one input (model.linear.FanOut), in place: by columns where one row of float32 is to be multiplied, and they have
    more rows than columns or several threads share them, else by rows. Names, shapes and values stay, but the weights
    are views then: make them contiguous to save them.

    Decoding multiplies each matrix by few rows, in the time that it takes to read the matrix, and the product with one
    row reads long runs faster than short ones (python -m benchmarks.one_row). Products of many rows, as in a prefill,
    take as long as before; only the lookup of tokens in a tied embedding is slower, by 10 ms for 1,024 tokens of the
    vocabulary and width of GPT-2. Laying out GPT-2 124M takes half a second."""
    if next(model.parameters()).device.type != "cpu":
        return
    joined = {layer for module in model.modules() if isinstance(module, FanOut) for layer in module.join(rows)}
    for module in model.modules():
        if isinstance(module, Linear) and module not in joined:
            module.weight.data = read_fast(module.weight.data, rows)
    head = model.lm_head.weight
    head.data = read_fast(head.data, rows)
