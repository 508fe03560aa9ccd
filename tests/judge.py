"""The judge: LFM2 and LFM2-MoE as equations in NumPy, against which everything else is compared.

One sequence, no cache, no batch, float64 unless told otherwise; written from the published
equations and sharing no code with `lfm_mlx`. Shapes: L tokens, D hidden, H heads, G key/value
heads, P head width, E experts, K experts per token, W conv width, V vocabulary.
"""

from collections.abc import Callable, Mapping

import numpy as np

Array = np.ndarray
Tensors = Mapping[str, Array]
Route = tuple[Array, Array]


def judge_logits(config: dict, tensors: Tensors, tokens: Array, dtype: type = np.float64) -> Array:
    """Logits [L, V] after each of `tokens` [L], from tensors by their hub names."""
    return _forward(config, tensors, tokens, dtype)[0]


def judge_experts(
    config: dict, tensors: Tensors, tokens: Array, dtype: type = np.float64
) -> list[Route]:
    """For each sparse layer, in order, the chosen experts [L, K] and their weights [L, K]."""
    return _forward(config, tensors, tokens, dtype)[1]


def judge_router(
    x: Array,
    gate: Array,
    bias: Array | None,
    k: int,
    norm: bool,
    scale: float,
    *,
    score: Callable[[Array], Array] | None = None,
    biased_weights: bool = False,
    epsilon: float = 1e-6,
) -> Route:
    """Choose k experts for each token: x [L, D], gate [E, D], bias [E] -> ([L, K], [L, K]).

    The bias helps to choose and never weighs. Experts come by falling score; of equal scores the
    lower index comes first, where torch leaves the order open. The keyword arguments exist to
    state wrong rules, so that tests can show that they would be noticed.
    """
    scores = (score or sigmoid)(x @ gate.T)
    biased = scores if bias is None else scores + bias
    experts = np.argsort(-biased, axis=-1, kind="stable")[:, :k]
    weights = np.take_along_axis(biased if biased_weights else scores, experts, axis=-1)
    if norm:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + epsilon)
    return experts, weights * scale


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return weight * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def swiglu(x: Array, w1: Array, w2: Array, w3: Array) -> Array:
    """x [L, D], w1 and w3 [F, D], w2 [D, F] -> [L, D]."""
    gate = x @ w1.T
    return (gate * sigmoid(gate) * (x @ w3.T)) @ w2.T


def rope(x: Array, theta: float) -> Array:
    """Rotate each pair (j, j + P/2) of x [L, H, P] by position * theta^(-2j/P)."""
    length, _, width = x.shape
    frequency = theta ** (-np.arange(0, width, 2) / width)
    angle = (np.arange(length)[:, None] * frequency)[:, None, :]  # [L, 1, P/2]
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(config: dict, x: Array, p: Callable[[str], Array]) -> Array:
    """Causal grouped-query attention: x [L, D] -> [L, D]."""
    length, hidden = x.shape
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width, eps = hidden // heads, config["norm_eps"]
    nested = config.get("rope_parameters")
    theta = float(nested["rope_theta"] if nested else config["rope_theta"])

    q = (x @ p("q_proj.weight").T).reshape(length, heads, width)
    k = (x @ p("k_proj.weight").T).reshape(length, groups, width)
    v = (x @ p("v_proj.weight").T).reshape(length, groups, width)
    q = rope(rms_norm(q, p("q_layernorm.weight"), eps), theta)
    k = rope(rms_norm(k, p("k_layernorm.weight"), eps), theta)
    # Query head h reads key/value head h // (H/G).
    k, v = (np.repeat(kv, heads // groups, axis=1) for kv in (k, v))

    scores = np.einsum("lhp,mhp->hlm", q, k) / x.dtype.type(width**0.5)
    future = np.triu(np.ones((length, length), dtype=bool), k=1)
    scores = np.where(future, -np.inf, scores)
    mixed = np.einsum("hlm,mhp->lhp", softmax(scores), v)
    return mixed.reshape(length, hidden) @ p("out_proj.weight").T


def short_conv(config: dict, x: Array, p: Callable[[str], Array]) -> Array:
    """Gated depthwise causal convolution: x [L, D] -> [L, D]; the last tap is the current token."""
    length, width = len(x), config["conv_L_cache"]
    bias = p if config.get("conv_bias", False) else lambda name: x.dtype.type(0)
    b, c, u = np.split(x @ p("in_proj.weight").T + bias("in_proj.bias"), 3, axis=-1)
    past = np.pad(b * u, ((width - 1, 0), (0, 0)))  # zeros before the first token
    taps = p("conv.weight")[:, 0, :]  # [D, W]
    y = sum(taps[:, w] * past[w : w + length] for w in range(width)) + bias("conv.bias")
    return (c * y) @ p("out_proj.weight").T + bias("out_proj.bias")


def sparse_feed_forward(
    config: dict, x: Array, p: Callable[[str], Array], routes: list[Route]
) -> Array:
    """The weighted sum of K experts for each token: x [L, D] -> [L, D]; appends to `routes`."""
    bias = p("expert_bias") if config["use_expert_bias"] else None
    k, norm = config["num_experts_per_tok"], config["norm_topk_prob"]
    routes.append(judge_router(x, p("gate.weight"), bias, k, norm, config["routed_scaling_factor"]))
    y = np.zeros_like(x)
    for expert in range(config["num_experts"]):
        w1, w2, w3 = (p(f"experts.{expert}.{w}.weight") for w in ("w1", "w2", "w3"))
        token, slot = np.nonzero(routes[-1][0] == expert)
        y[token] += routes[-1][1][token, slot, None] * swiglu(x[token], w1, w2, w3)
    return y


def is_attention(config: dict, layer: int) -> bool:
    """Whether a layer attends, from `layer_types` or, in older dense configs, `full_attn_idxs`."""
    if config.get("layer_types"):
        return config["layer_types"][layer] == "full_attention"
    return config.get("full_attn_idxs") is None or layer in config["full_attn_idxs"]


def _forward(
    config: dict, tensors: Tensors, tokens: Array, dtype: type
) -> tuple[Array, list[Route]]:
    def at(prefix: str) -> Callable[[str], Array]:
        return lambda name: tensors[prefix + name].astype(dtype)

    p, eps = at("model."), config["norm_eps"]
    routes: list[Route] = []
    x = p("embed_tokens.weight")[tokens]
    for i in range(config["num_hidden_layers"]):
        layer, feed = at(f"model.layers.{i}."), at(f"model.layers.{i}.feed_forward.")
        normed = rms_norm(x, layer("operator_norm.weight"), eps)
        if is_attention(config, i):
            x = x + attention(config, normed, at(f"model.layers.{i}.self_attn."))
        else:
            x = x + short_conv(config, normed, at(f"model.layers.{i}.conv."))
        normed = rms_norm(x, layer("ffn_norm.weight"), eps)
        if config["model_type"] == "lfm2" or i < config["num_dense_layers"]:
            x = x + swiglu(normed, *(feed(f"{w}.weight") for w in ("w1", "w2", "w3")))
        else:
            x = x + sparse_feed_forward(config, normed, feed, routes)
    x = rms_norm(x, p("embedding_norm.weight"), eps)
    tied = config.get("tie_embedding", config.get("tie_word_embeddings", True))
    head = p("embed_tokens.weight") if tied else tensors["lm_head.weight"].astype(dtype)
    return x @ head.T, routes
