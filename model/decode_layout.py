"""How a model's matrices lie in memory where it decodes on a CPU: applied from outside, as initialisation is."""

from model.linear import join
from model.transformer import TransformerLM


def lay_out_for_decoding(model: TransformerLM) -> None:
    """Store the matrices (out, in) on a CPU that have more rows than columns by columns, and join those that have one
    input (model.linear.join), in place. Names, shapes and values stay; to save the weights, make them contiguous.

    Decoding multiplies each matrix by one row, in the time that it takes to read the matrix, and the product reads long
    runs faster than short ones: at a width of 128 the LM head takes 40 % of the time, the first matrix of a wide MLP
    60 % (python -m benchmarks.one_row). Products of many rows, as in a prefill, take as long as before."""
    if next(model.parameters()).device.type != "cpu":
        return
    for module in model.modules():
        layers = getattr(module, "of_one_input", tuple)()
        if layers:
            join(*layers)
    for matrix in model.parameters():
        if matrix.dim() == 2 and matrix.shape[0] > matrix.shape[1] and matrix.is_contiguous():
            matrix.data = matrix.data.mT.contiguous().mT
