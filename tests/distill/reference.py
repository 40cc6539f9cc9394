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


def terms_and_slopes(name, log_p, log_q, *, jsd_beta, skew):
    """What each token adds to a divergence, and its derivative with respect to q, for p above 0 or q above 0."""
    p, q = np.exp(log_p), np.exp(log_q)

    def log_mixture(teachers, students):
        return np.logaddexp(np.log(teachers) + log_p, np.log(students) + log_q)

    with np.errstate(invalid="ignore"):
        if name == "reverse_kl":
            return q * (log_q - log_p), log_q - log_p + 1
        if name == "jsd":
            log_m = log_mixture(jsd_beta, 1 - jsd_beta)
            of_teacher = np.where(p > 0, p * (log_p - log_m), 0)
            return jsd_beta * of_teacher + (1 - jsd_beta) * q * (log_q - log_m), (1 - jsd_beta) * (log_q - log_m)
        if name == "skew_kl":
            log_m = log_mixture(skew, 1 - skew)
            return np.where(p > 0, p * (log_p - log_m), 0), -(1 - skew) * np.exp(log_p - log_m)
        if name == "skew_reverse_kl":
            log_m = log_mixture(1 - skew, skew)
            return q * (log_q - log_m), log_q - log_m + 1 - skew * np.exp(log_q - log_m)
    assert name == "tvd"
    return np.abs(p - q) / 2, np.sign(q - p) / 2


def divergence_and_gradient(name, student, teacher, kept, *, temperature, truncation_strategy, jsd_beta=0.5, skew=0.1):
    """A divergence per position, in nats, and its gradient with respect to the student's logits, by hand."""
    # The reverse KL is infinite where the teacher has no mass: what it gives none is left out of both softmaxes.
    has_mass = np.isfinite(teacher) if name == "reverse_kl" else np.ones(teacher.shape, bool)
    is_bucket = truncation_strategy == "other_bucket"
    inside, outside = kept & has_mass, ~kept & has_mass & is_bucket
    is_in_q = inside if truncation_strategy == "renormalize" else has_mass
    log_p = log_softmax(teacher, temperature, None if is_bucket else kept)
    log_q = log_softmax(student, temperature, is_in_q)
    tails = (log_sum_exp(np.where(outside, x, -np.inf)) for x in (log_p, log_q))
    # The bucket is one token more.
    log_p_of_all, log_q_of_all = (
        np.concatenate((np.where(inside, x, -np.inf), tail), -1) for x, tail in zip((log_p, log_q), tails, strict=True)
    )
    counted = np.isfinite(log_q_of_all)
    log_p_of_all, log_q_of_all = (np.where(counted, x, 0) for x in (log_p_of_all, log_q_of_all))
    terms, slopes = terms_and_slopes(name, log_p_of_all, log_q_of_all, jsd_beta=jsd_beta, skew=skew)
    terms, slopes = np.where(counted, terms, 0), np.where(counted, slopes, 0)
    pull = (np.where(counted, np.exp(log_q_of_all), 0) * slopes).sum(-1, keepdims=True)
    own = np.where(inside, slopes[..., :-1], np.where(outside, slopes[..., -1:], 0))
    return terms.sum(-1), np.exp(log_q) * (own - pull) / temperature


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
