"""ZB-H1 and ZB-H2: 1F1B whose weight gradients fill the bubbles.

Qi et al., ICLR 2024 (https://arxiv.org/abs/2401.10241), section 2; p stages, input and weight gradients apart::

    ZB-H1, stage 0 of 3   F0 F1 F2 .  .  .  I0 W0 F3 I1 W1 .  I2 W2 I3 W3
           stage 1        .  F0 F1 .  .  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
           stage 2        .  .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

ZB-H1 holds as much as 1F1B, p microbatches on every stage: stage s forwards p - s ahead and lags s weight gradients
behind. With equal stages its bubble is (p - 1) (F + I - W). ZB-H2 holds 2 p - 1: 2 (p - s) - 1 forwards ahead and 2 s
weight gradients behind; its bubble is (p - 1) (F + I - 2 W), nothing where all three take as long.
"""

from __future__ import annotations

from .one_way import Unit, delay_weights, warm_then_alternate


def order_h1(position: int, n_workers: int, n_microbatches: int) -> list[Unit]:
    """Return one worker's order of ZB-H1."""
    return delay_weights(warm_then_alternate(n_workers - position, n_microbatches), position)


def order_h2(position: int, n_workers: int, n_microbatches: int) -> list[Unit]:
    """Return one worker's order of ZB-H2."""
    return delay_weights(warm_then_alternate(2 * (n_workers - position) - 1, n_microbatches), 2 * position)
