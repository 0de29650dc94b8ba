"""Synthetic clicks whose probability is known, so that the best score that any model can reach is known too."""

import numpy as np

NUMBERS = 13
"""Of each impression: the age of the account, hours since the last visit, and so on; here normal numbers."""

SIZES = (600, 400, 100, 60, 50, 24, 12, 7)
"""How many users, items, cities, shops, kinds, hours, devices and days there are."""

TASTES = 3


def clicks(count: int, seed: int) -> dict[str, np.ndarray]:
    """Impressions with whether they were clicked on, and with what probability.

    The logit is a line of the numbers, a product of two of them, a bias of each category, and the product of the user's
    tastes with the item's and with the city's. Few users, items and cities are frequent, as it is in real logs. The
    world is always the same; `seed` draws the impressions.
    """
    world = np.random.default_rng(0)
    weights = world.normal(0, 0.25, NUMBERS)
    biases = [world.normal(0, 0.4, size) for size in SIZES]
    tastes = [world.normal(0, TASTES**-0.25, (size, TASTES)) for size in SIZES[:3]]
    random = np.random.default_rng([seed, 1])
    numbers = random.normal(0, 1, (count, NUMBERS)).round(2).astype(np.float32)
    categories = np.stack([(size * random.random(count) ** 2).astype(np.int64) for size in SIZES], axis=1)
    user, item, city = (table[categories[:, place]] for place, table in enumerate(tastes))
    logit = -1.2 + numbers @ weights + 0.3 * numbers[:, 0] * numbers[:, 1]
    logit += sum(table[categories[:, place]] for place, table in enumerate(biases))
    logit += (user * item).sum(1) + 0.5 * (user * city).sum(1)
    probability = 1 / (1 + np.exp(-logit))
    click = (random.random(count) < probability).astype(np.int64)
    return {
        "numbers": numbers,
        "categories": categories,
        "click": click,
        "probability": probability.astype(np.float32),
    }
