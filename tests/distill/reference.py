"""The definitions of the distillation loss once more, in float64 NumPy, independent of the code under test.

# N positions, V vocabulary
"""

import numpy as np


def order_of(logits):
    """Token ids of each position, highest logit first, equal logits by lower id."""
    return np.argsort(-logits.astype(np.float64), axis=-1, kind="stable")


def kept_set(logits, *, temperature, top_k=0, top_p=0.0):
    """Membership in K by the definition, one position after the other."""
    kept = np.ones(logits.shape, bool)
    if not top_k and not top_p:
        return kept
    for position in np.ndindex(logits.shape[:-1]):
        order = order_of(logits[position])
        size = top_k
        if top_p:
            prefix_sums = np.cumsum(softmax(logits[position], temperature)[order])
            reached = prefix_sums >= top_p
            size = reached.argmax() + 1 if top_p < 1.0 and reached.any() else logits.shape[-1]
        kept[position][order[size:]] = False
    return kept


def is_nucleus(kept, logits, *, temperature, top_p, slack=1e-6):
    """Per position: whether `kept` is the nucleus of a mass within `slack` of top_p. float32 can promise no more."""
    order = order_of(logits)
    kept_in_order = np.take_along_axis(kept, order, -1)
    size = kept.sum(-1, keepdims=True)
    is_prefix = (kept_in_order == (np.arange(kept.shape[-1]) < size)).all(-1)
    prefix_sums = np.cumsum(np.take_along_axis(softmax(logits, temperature), order, -1), -1)
    mass = np.take_along_axis(prefix_sums, size - 1, -1)[..., 0]
    mass_before = np.where(size > 1, np.take_along_axis(prefix_sums, np.maximum(size - 2, 0), -1), 0.0)[..., 0]
    return is_prefix & (size[..., 0] > 0) & (mass >= top_p - slack) & (mass_before < top_p + slack)


def log_softmax(logits, temperature, kept=None):
    """log softmax(logits / T), conditioned on `kept`, -inf outside."""
    scaled = logits.astype(np.float64) / temperature
    scaled = scaled if kept is None else np.where(kept, scaled, -np.inf)
    return scaled - log_sum_exp(scaled)


def log_sum_exp(scaled):
    maximum = scaled.max(-1, keepdims=True)
    maximum = np.where(np.isfinite(maximum), maximum, 0.0)
    with np.errstate(divide="ignore"):
        return maximum + np.log(np.exp(scaled - maximum).sum(-1, keepdims=True))


def softmax(logits, temperature):
    return np.exp(log_softmax(logits, temperature))


def kl_and_gradient(student, teacher, kept, *, temperature, truncation_strategy):
    """KL(teacher || student) per position, in nats, and its gradient with respect to the student's logits, by hand."""
    conditions_teacher = truncation_strategy in ("renormalize", "renormalize_teacher")
    conditions_student = truncation_strategy == "renormalize"
    log_p = log_softmax(teacher, temperature, kept if conditions_teacher else None)
    log_q = log_softmax(student, temperature, kept if conditions_student else None)
    p, q = np.exp(log_p), np.exp(log_q)
    kl = divergence(np.where(kept, log_p, -np.inf), log_q)
    slope = np.where(kept, q - p, 0.0 if conditions_student else q)
    if truncation_strategy == "other_bucket":
        log_p_tail = log_sum_exp(np.where(kept, -np.inf, log_p))
        log_q_tail = log_sum_exp(np.where(kept, -np.inf, log_q))
        kl = kl + divergence(log_p_tail, log_q_tail)
        has_no_tail = kept | ~np.isfinite(log_p_tail)
        with np.errstate(invalid="ignore"):
            log_p_as_q = np.where(has_no_tail, -np.inf, log_p_tail + log_q - log_q_tail)
        slope = np.where(kept, q - p, q - np.exp(log_p_as_q))
    return kl, slope / temperature


def divergence(log_p, log_q):
    """sum of p (log p - log q) over the last axis, where p = 0 contributes 0."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        return np.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def cross_entropy(logits, targets):
    return -np.take_along_axis(log_softmax(logits, 1.0), targets[..., None], -1)[..., 0]


def logits_of_every_scale(seed, positions, vocabulary, *, largest=1e4):
    """Student and teacher float32 logits [N, V], almost uniform to almost one-hot, near to and far from each other."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.uniform(np.log(1e-2), np.log(largest / 5), (positions, 1)))
    teacher = scale * rng.standard_normal((positions, vocabulary))
    distance = np.exp(rng.uniform(np.log(1e-3), 0.0, (positions, 1)))
    student = teacher + distance * scale * rng.standard_normal((positions, vocabulary))
    return (np.clip(logits, -largest, largest).astype(np.float32) for logits in (student, teacher))
