"""Prints every number of docs/attention.md, section by section.

python -m benchmarks.attention_by_numbers             # all of them, less than a minute
python -m benchmarks.attention_by_numbers absorbing
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.side_by_side import in_turns
from model import cost
from model.attention.indexer import Index, indexer_loss
from model.attention.mla import MLA
from model.context import Context
from model.initialise import initialised
from model.kernels.base import How
from model.kernels.naive import Naive
from model.mask import CAUSAL, Mask
from model.placement import Placement
from model.rope import Rope
from model.stats import attention_map
from model.transformer import ModelConfig
from training.run.config import compose

DRAW = torch.Generator()
PUBLISHED = {  # choices of experiment=shape/: vocabulary, name
    "gpt2": (50257, "GPT-2"),
    "qwen2_5_32b": (152064, "Qwen2.5-32B"),
    "deepseek_v3": (129280, "DeepSeek-V3"),
    "kimi_k2": (163840, "Kimi K2"),
}
LATENTS_NORMED = {"qk_norm": "latent", "qk_rope_head_dim": 16}  # as in DeepSeek's, and a quarter of a head rotated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", nargs="*", choices=[[], *SECTIONS], help=", ".join(SECTIONS))
    for name in parser.parse_args().section or SECTIONS:
        print(f"# {name}")
        show(name)
        print()


@torch.no_grad()
def show(section: str) -> None:
    DRAW.manual_seed(0)
    SECTIONS[section]()


def definition() -> None:
    """Three tokens, one head of two dimensions."""
    q, k = torch.tensor([[1.0, 0], [0, 1], [1, 1]]), torch.tensor([[2.0, 0], [0, 2], [1, 1]])
    v = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    scores = q @ k.T / math.sqrt(2)
    weights = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), -math.inf).softmax(-1)
    print("q:", _numbers(q), " k:", _numbers(k), " v:", _numbers(v))
    print("q k / sqrt(2), before hiding:", _numbers(scores))
    print("weights:", _numbers(weights))
    print("weights @ v:", _numbers(weights @ v))
    positions = torch.arange(3)[None]
    mask = Mask(positions, positions, contiguous=True, pattern=CAUSAL)
    ours = Naive()(*(x[None, :, None] for x in (q, k, v)), mask, How(1 / math.sqrt(2))).out
    print("kernel=naive:", _numbers(ours[0, :, 0]))
    for tokens in (1024, 32768):
        print(f"scores of 12 heads over {tokens:,} tokens in float32: {12 * tokens**2 * 4 / 1e9:.2f} GB")


def online_softmax() -> None:
    """One row of scores, a key at a time; and what the misprinted sign gives."""
    scores, values = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([10.0, 20.0, 30.0])
    m, total, out = -math.inf, 0.0, 0.0
    for x, value in zip(scores.tolist(), values.tolist(), strict=True):
        new = max(m, x)
        rescale, weight = math.exp(m - new), math.exp(x - new)
        total, out, m = total * rescale + weight, out * rescale + weight * value, new
        print(f"score {x:g}: m {m:g}, rescale {rescale:.4f}, l {total:.4f}, o {out:.4f}")
    print(f"o / l = {out / total:.4f}; softmax at once = {(scores.softmax(0) * values).sum():.4f}")
    print(f"L = m + log l = {m + math.log(total):.4f}; logsumexp = {scores.logsumexp(0):.4f}")
    m, total, out = -1e30, 0.0, 0.0
    for x, value in zip(scores.tolist(), values.tolist(), strict=True):
        new = max(m, x)
        rescale, weight = math.exp(min(700, new - m)) if m > -1e30 else 0.0, math.exp(x - new)
        total, out, m = total * rescale + weight, out * rescale + weight * value, new
    print(f"with e^(m_new - m_old), as misprinted: {out / total:.4f}")


def sharing() -> None:
    """Cache and parameters of each attention at GPT-2's dimensions."""
    for name in ("mha", "gqa", "mqa", "mla"):
        config = _config(name)
        model = cost.on_meta(config, 50257)
        kept = config.attention.cache_elements
        print(
            f"{name}: {kept:>5,} numbers per token and layer ({kept * 12 * 2 * 1024 / 1e6:.1f} MB for 1024 tokens, "
            f"bfloat16), {cost.parameters(model)['attention'] / 1e6:.1f}M parameters, "
            f"{cost.flops(config, 50257).per_pair // 12:,} FLOPs per query, key and layer"
        )
    print(f"DeepSeek-V3, c 512 and r 64: {512 + 64} numbers; its 128 heads of 128 would keep {2 * 128 * 128:,}")


def latent() -> None:
    """The shapes of one MLA layer at GPT-2's dimensions, four tokens."""
    config = _config("mla", **LATENTS_NORMED)
    layer, attention = _layer(config), config.attention
    x = torch.randn(1, 4, config.d_model, generator=DRAW)
    down = layer.kv_down(x)
    c, r, n, v = attention.kv_lora_rank, attention.qk_rope_head_dim, attention.qk_nope_head_dim, attention.v_head_dim
    print(f"x {_shape(x)}; H {config.n_heads}, n {n}, r {r}, v {v}, c {c}")
    print(f"q_proj x {_shape(layer.q_proj(x))} = H · (n + r)")
    print(f"kv_down x {_shape(down)} = c + r")
    print(f"kv_up latent {_shape(layer.kv_up(down[..., :c]))} = H · (n + v)")
    print(f"kept per token: c + r = {attention.cache_elements}; the keys and values of all heads: {12 * (n + r + v):,}")


def decoupling() -> None:
    """A rotation between the two matrices cannot be folded into them: one matrix for each distance would be needed."""
    dim, rank = 16, 8
    rope = Rope(dim, 10000.0, "half")
    w_q, w_k = (torch.randn(dim, rank, generator=DRAW) / math.sqrt(rank) for _ in range(2))

    def rotated(position: int) -> Tensor:
        table = rope.table(torch.tensor([[position]]))
        return rope.rotate(torch.eye(dim)[None, :, None], tuple(x.expand(1, dim, 1, -1) for x in table))[0, :, 0].T

    for distance in (0, 1, 2, 50):
        between = w_q.T @ rotated(distance).T @ w_k
        print(f"|Wq^T R({distance})^T Wk - Wq^T Wk| = {(between - w_q.T @ w_k).norm():.3f}")
    far = w_q.T @ (rotated(57).T @ rotated(7)) @ w_k
    print(f"|Wq^T R(57)^T R(7) Wk - Wq^T R(50)^T Wk| is {_small((far - w_q.T @ rotated(50).T @ w_k).norm())}")


def absorbing() -> None:
    """Absorbed = expanded = naive, and what each costs."""
    outputs = {}
    x = torch.randn(1, 64, 768, generator=DRAW)
    for execution in ("naive", "expanded", "absorbed"):
        layer = _layer(_config("mla", execution=execution, **LATENTS_NORMED))
        outputs[execution] = layer(x, _context(layer, 0, 64))[0]
    scale = outputs["naive"].abs().max()
    for execution in ("expanded", "absorbed"):
        error = (outputs[execution] - outputs["naive"]).abs().max() / scale
        print(f"{execution} against naive, relative to the largest number: {_small(error)}")
    for name, (c, n, v) in {"GPT-2": (192, 48, 64), "DeepSeek-V3": (512, 128, 128)}.items():
        print(f"{name}, c {c}, n {n}, v {v}: T* = c(n + v)/(2c - n - v) = {c * (n + v) / (2 * c - n - v):.0f} queries")
    ratio = (2 * 512 + 64) / (128 + 64 + 128)
    print(f"DeepSeek-V3, products per query and key: absorbed (c + r) + c = {ratio:.1f} times expanded (n + r) + v")


def crossover() -> None:
    """The time of one MLA layer at GPT-2's dimensions, with the cache it reads, on one thread of this machine."""
    torch.set_num_threads(1)
    cached = 4096
    for queries in (1, 16, 64, 128, 256, 512):
        runs = {execution: _against_a_cache(execution, queries, cached) for execution in ("expanded", "absorbed")}
        timings = in_turns(runs, rounds=5)
        print(
            f"{queries:>4} queries, {cached} cached: "
            + ", ".join(f"{name} {1e3 * timing.median:.1f} ms" for name, timing in timings.items())
        )


def choosing() -> None:
    """An indexer of one head, four tokens, of which the last query attends to two."""
    k = torch.tensor([[[2.0, 0], [0, 1], [-1, 0], [1, 1]]])
    index = Index(torch.tensor([[[[1.0, 0]]]]), k[:, -1:], torch.ones(1, 1, 1), 2, False)
    mask = Mask(torch.tensor([[3]]), torch.arange(4)[None], contiguous=False, pattern=CAUSAL)
    scores, chosen = index.scores(k, mask, slice(0, 1), slice(0, 4)), index.chosen(k, mask, slice(0, 1))
    print("ReLU(q k):", _numbers(scores[0]), " chosen:", chosen[0].int().tolist())
    attention_q, attention_k = torch.tensor([[[[1.0, 1], [1, 0]]]]), k.unsqueeze(2)
    weights = attention_map(attention_q, attention_k, mask.among(chosen), 1 / math.sqrt(2))[0]
    print("attention to the chosen, of two heads:", _numbers(weights[:, 0]))
    mean, share = weights.mean(0), scores.masked_fill(~chosen, -math.inf).softmax(-1)[0]
    print("their mean p:", _numbers(mean), " softmax I:", _numbers(share))
    loss = indexer_loss(index, k, attention_q, attention_k, mask.among(chosen), 1 / math.sqrt(2))
    print(f"loss, KL(p, softmax I): {loss:.4f} nats")
    for name in ("mla", "dsa"):
        config = compose("model=gpt2", f"attention={name}").model
        print(f"model=gpt2 attention={name}: {config.attention.cache_elements} numbers cached per token and layer")


def published() -> None:
    """Published models, built on the meta device."""
    for name, (vocab_size, title) in PUBLISHED.items():
        model = cost.on_meta(compose(f"experiment=shape/{name}").model, vocab_size)
        parameters = sum(tensor.numel() for tensor in model.state_dict().values())
        active = f", {cost.active_parameters(model) / 1e9:.1f} billion active" if cost.has_experts(model) else ""
        cached = cost.cache_bytes_per_token(model) // 2
        print(f"{title}: {parameters / 1e9:,.3f} billion parameters{active}; {cached:,} bytes of cache per token")


def windows() -> None:
    """What a window keeps of 100,000 tokens."""
    local = {"window": 256}
    for name, settings in {"all": {}, "window 256": local, "and 4 global tokens": local | {"global_tokens": 4}}.items():
        model = cost.on_meta(_config("gqa", **settings), 50257)
        caches = model.make_caches(1, 100_000)
        held = sum(column[:, 1:].nbytes for cache in caches for column in cache.columns.values())
        print(f"gqa, {name}: {held / 1e6:,.1f} MB in float32 for 100,000 tokens")


def _config(attention: str, **settings: object) -> ModelConfig:
    given = (f"attention.{name}={value}" for name, value in settings.items())
    return compose("model=gpt2", f"attention={attention}", *given, "kernel=sdpa").model


def _layer(config: ModelConfig) -> MLA:
    layer = initialised(config.model_copy(update={"n_layers": 1}), 64, seed=0).layers[0].attention
    torch.nn.init.normal_(layer.o_proj.weight, std=0.03, generator=torch.Generator().manual_seed(1))
    return layer


def _context(layer: MLA, first: int, count: int) -> Context:
    """Of `count` tokens, the whole text or what goes on from what is cached."""
    positions = torch.arange(first, first + count)[None]
    at = Placement.decode(positions, []) if first else Placement.contiguous(count)
    return Context(at, rotary={layer.rope: layer.rope.table(at.positions)})


def _against_a_cache(execution: str, queries: int, cached: int) -> Callable[[], object]:
    layer = _layer(_config("mla", execution=execution, **LATENTS_NORMED))
    cache = layer.make_cache(1, cached + queries)
    layer(torch.randn(1, cached, 768, generator=DRAW), _context(layer, 0, cached), cache)
    x, ctx = torch.randn(1, queries, 768, generator=DRAW), _context(layer, cached, queries)

    @torch.no_grad()
    def run() -> object:
        return layer(x, ctx, cache)

    return run


def _numbers(x: Tensor) -> str:
    return str([[round(value, 3) for value in row] for row in x.tolist()])


def _small(error: Tensor) -> str:
    """Rounding differs from machine to machine."""
    return f"{'below' if error < 1e-5 else 'NOT below'} 1e-5"


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


SECTIONS = {
    "definition": definition,
    "online-softmax": online_softmax,
    "sharing": sharing,
    "latent": latent,
    "decoupling": decoupling,
    "absorbing": absorbing,
    "crossover": crossover,
    "windows": windows,
    "choosing": choosing,
    "published": published,
}

if __name__ == "__main__":
    main()
