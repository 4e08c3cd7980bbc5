"""Seeded mutations of JSON and TOML: what a stranger, a mistake or a damaged disk makes of it."""

import copy
import json
import random
import tomllib

VALUES = (
    None,
    True,
    0,
    -1,
    0.5,
    10**18,
    -(10**18),
    1e308,
    5e-324,
    "",
    "x",
    "$\\frac{",
    "\x1b[31m\n\u202e",
    "n" * 100_000,
    "[red]",
    "../../x",
    [],
    {},
    [[]],
    {"": {"a": [1]}},
    [None, 1, "a"],
    {"value": 1, "low": 1, "high": 0, "n": 1, "hits": 5},
)
TEXTS = (
    "",
    "null",
    "[]",
    '"text"',
    "[" * 5000,
    '{"a":' * 5000,
    "9" * 5000,
    "NaN",
    '{"name": 1e999}',
    '{"a": 1, "a": 2}',
    '{"name": "\\ud800"}',
    "\ufeff{}",
    "\x00",
)


def choose_place(content, chance):
    """Return a table or list below the content and one of its keys; each level is as likely."""
    while True:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = chance.choice(keys)
        below = content[key]
        if not isinstance(below, dict | list) or not below or chance.random() < 0.3:
            return content, key
        content = below


def mutate(content, chance):
    """Return a copy with one value deleted, renamed, repeated, nested or replaced."""
    changed = copy.deepcopy(content)
    table, key = choose_place(changed, chance)
    match chance.randrange(6):
        case 0:
            del table[key]
        case 1:
            table[key] = [table[key]]
        case 2:
            table[key] = {"x": table[key]}
        case 3 if isinstance(table, list):
            table.append(table[key])
        case 3:
            table[f"{key}x"] = table.pop(key)
        case _:
            table[key] = chance.choice(VALUES)
    return changed


def mutated_texts(content, count, seed=0):
    """Yield texts of JSON files: mutated content, cut-short text, and no such JSON at all."""
    chance, whole = random.Random(seed), json.dumps(content)
    yield from TEXTS
    for number in range(count):
        if number % 8 == 0:
            yield whole[: chance.randrange(len(whole))]
        else:
            changed = mutate(content, chance)
            for _ in range(chance.randrange(3)):
                changed = mutate(changed, chance)
            yield json.dumps(changed)


def write_value(value):
    """Return a value as one line of TOML; null, which TOML lacks, becomes an empty text."""
    match value:
        case None:
            return '""'
        case dict():
            items = (f"{json.dumps(key)} = {write_value(item)}" for key, item in value.items())
            return f"{{{', '.join(items)}}}"
        case list():
            return f"[{', '.join(map(write_value, value))}]"
        case _:
            return json.dumps(value)


def mutated_recipes(whole, count, seed=0):
    """Yield recipes with a few changed values, cut-short ones, and texts that are no recipe."""
    chance = random.Random(seed)
    yield from TEXTS
    for number in range(count):
        if number % 8 == 0:
            yield whole[: chance.randrange(len(whole))]
            continue
        changed = tomllib.loads(whole)
        for _ in range(chance.randrange(1, 4)):
            changed = mutate(changed, chance)
        yield "\n".join(f"{json.dumps(key)} = {write_value(changed[key])}" for key in changed)
