"""Random draws for every format: damaged bytes, odd values, damaged trees of JSON and YAML."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import yaml

WIDTHS = (1, 2, 4, 8)

ODD_NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(10**30, 10**400, 0.0, -0.0, 0.5, 1.0, 1e-320, 1e-45, 1e308, -1e308, 0.1 + 0.2, 1.5, float("nan"), float("inf")),
    float("-inf"),
)

ODD_TEXTS = (
    *(
        "",
        " ",
        "x",
        "0",
        "null",
        "~",
        "true",
        "1e3",
        "0x10",
        "-",
        "--help",
        "None",
        "\t",
        "a\nb",
        "a\0b",
        "\x1b[2J\x1b[31m",
    ),
    *("\u202etxt.gpj", "\ud800", "\ufeff", "\u2028", "é", "日本語", "🦆", "x" * 300, "y" * 70_000, "../../canary/file"),
    *("/dev/zero", "/dev/null", "/proc/self/mem", "/proc/kmsg", "/", ".", "..", "./photos", "photo", "~nobody/x", "~"),
    *("$UNSET_VARIABLE", "${HOME}", "$$", "${", "$", "s3://bucket/x.tar", "pipe:cat /etc/passwd", "a::b", "{0..9}.tar"),
    *(
        "{0..99999999999}.tar",
        "{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}",
        "*",
        "[",
        "[!]",
        "a*/b?",
        "%s%n",
        "{}",
        "[1, 2",
        "&a *a",
    ),
    *(
        "torchvision:CIFAR10:.",
        "torchvision:LSUN:.",
        "torchvision:",
        "torchvision:FakeData:.",
        "!!python/name:os.system",
    ),
)

ODD: tuple[Any, ...] = (*ODD_NUMBERS, *ODD_TEXTS, None, True, False, [], {}, [1], [0, 0], [1, 2, 3], [[]], {"a": 1})


def times(draw: random.Random, most: int = 4) -> range:
    """Return a range with a random number of repetitions, usually one and at most `most`."""
    return range(min(most, 1 + int(draw.expovariate(1.0))))


def damaged(draw: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Return bytes with a few changes that do not depend on the format. Pieces of `others` may be spliced in."""
    for _ in times(draw):
        data = draw.choice(_CHANGES)(draw, data, others)
    return data


def _flip(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _bit in range(draw.choice((1, 1, 2, 8)) if data else 0):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _truncate(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data[: draw.randrange(len(data) + 1)] if draw.random() < 0.8 else data[draw.randrange(len(data) + 1) :]


def _cut_out(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = place(draw, data)
    return data[:start] + data[end:]


def _repeat(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = place(draw, data)
    return data[:end] + data[start:end] * draw.choice((1, 1, 2, 50)) + data[end:]


def _insert(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = draw.randrange(len(data) + 1)
    count = draw.choice((1, 2, 16, 512))
    return data[:at] + draw.choice((draw.randbytes(count), bytes(count), b"\xff" * count)) + data[at:]


def _overwrite(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = place(draw, data)
    return data[:start] + draw.choice((draw.randbytes, bytes, lambda n: b"\xff" * n))(end - start) + data[end:]


def _number(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """Overwrite a few bytes with a number that could be a length."""
    width = draw.choice(WIDTHS)
    at = draw.randrange(max(1, len(data)))
    return data[:at] + integer(draw, width, len(data)) + data[at + width :]


def _splice(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = draw.choice(others) if others else data
    return data[: draw.randrange(len(data) + 1)] + other[draw.randrange(len(other) + 1) :]


_CHANGES: tuple[Callable[[random.Random, bytes, Sequence[bytes]], bytes], ...] = (
    *(_flip, _flip, _truncate, _cut_out, _repeat, _insert, _overwrite, _number, _number, _splice),
)


def place(draw: random.Random, data: bytes) -> tuple[int, int]:
    """Return start and end of a random piece of `data`, usually a short one."""
    start = draw.randrange(len(data) + 1)
    return start, min(len(data), start + int(draw.expovariate(1 / 24)))


def integer(draw: random.Random, width: int, near: int) -> bytes:
    """Return `width` bytes with an extreme number, or a number close to `near`, in a random byte order."""
    top = 1 << 8 * width
    value = draw.choice(
        (0, 1, 2, near, near + 1, near - 1, 2 * near, top - 1, top // 2, top // 2 - 1, draw.randrange(top))
    )
    return (value % top).to_bytes(width, draw.choice(("little", "big")))


def odd(draw: random.Random) -> Any:
    """Return a value that is unusual for a setting, a label or a JSON field."""
    chance = draw.random()
    if chance < 0.1:
        return draw.randrange(-(2 ** draw.choice((4, 16, 70))), 2 ** draw.choice((4, 16, 70)))
    if chance < 0.15:
        return draw.uniform(-2, 2) * 10 ** draw.randrange(-6, 7)
    if chance < 0.2:
        return [odd(draw) for _ in range(draw.randrange(6))]
    if chance < 0.24:
        return {str(odd(draw))[:20]: odd(draw) for _ in range(draw.randrange(4))}
    if chance < 0.26:
        return "".join(map(chr, draw.choices(range(0xD000), k=draw.randrange(1, 30))))
    return draw.choice(ODD)


def damaged_tree(draw: random.Random, tree: Any) -> Any:
    """Return a copy of a tree of dicts and lists with one change: of a value or a key, or an added or removed entry."""
    if isinstance(tree, dict) and tree and draw.random() < 0.85:
        key = draw.choice(list(tree))
        rest = {other: value for other, value in tree.items() if other != key}
        chance = draw.random()
        if chance < 0.08:
            return rest
        if chance < 0.16:
            return rest | {str(draw.choice(ODD_TEXTS)): tree[key]}
        return tree | {key: damaged_tree(draw, tree[key])}
    if isinstance(tree, list) and tree and draw.random() < 0.85:
        at = draw.randrange(len(tree))
        if draw.random() < 0.15:
            return tree[:at] + tree[at + 1 :]
        return [*tree[:at], damaged_tree(draw, tree[at]), *tree[at + 1 :]]
    return odd(draw)


def json_text(draw: random.Random, tree: Any) -> bytes:
    """Return a damaged tree as JSON. It is usually well-formed, with values that are legal JSON but unusual."""
    for _ in times(draw):
        tree = damaged_tree(draw, tree)
    chance = draw.random()
    if chance < 0.03:
        return b"[" * draw.choice((100, 100_000)) + b"1"
    if chance < 0.05:
        # `json.dumps` cannot write as deep a tree as files can hold.
        depth = draw.choice((50, 1500))
        return b'{"a":' * depth + b"1" + b"}" * depth
    text = json.dumps(tree).encode()
    return damaged(draw, text) if draw.random() < 0.25 else text


def json_lines(draw: random.Random, lines: Sequence[bytes], newest: Any) -> bytes:
    """Return a file of JSON lines in which some are damaged, usually at the end. `newest` is a valid record."""
    kept = list(lines)
    for _ in times(draw):
        chance = draw.random()
        if chance < 0.5 or not kept:
            kept.append(json_text(draw, newest))
        elif chance < 0.8:
            at = draw.choice((len(kept) - 1, draw.randrange(len(kept))))
            kept[at] = json_text(draw, json.loads(lines[at]) if at < len(lines) else newest)
        else:
            at = draw.randrange(len(kept))
            kept[at] = damaged(draw, kept[at], lines)
    text = b"\n".join(kept) + (b"\n" if draw.random() < 0.7 else b"")
    return damaged(draw, text) if draw.random() < 0.2 else text


def yaml_text(draw: random.Random, tree: object) -> bytes:
    """Return a tree as YAML, sometimes with tags, anchors, other encodings or damage."""
    style = draw.choice((None, None, False, True))
    try:
        text = yaml.safe_dump(tree, default_flow_style=style, allow_unicode=draw.random() < 0.5, sort_keys=False)
    except yaml.YAMLError:
        text = json.dumps(tree)
    chance = draw.random()
    if chance < 0.04:
        text += "\n" + "".join(
            f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else '1'] * 9)}]\n" for i in range(draw.choice((3, 12)))
        )
    elif chance < 0.08:
        text = text.replace(
            ": ",
            draw.choice(
                (
                    ": !!int ",
                    ": !!binary ",
                    ": !!python/object/apply:os.system ",
                    ": &a ",
                    ": *a ",
                    ": ! ",
                    ": !!set ",
                    ": |\n ",
                )
            ),
            1,
        )
    elif chance < 0.11:
        text += draw.choice(
            (
                "<<: *a\n",
                "? [a, b]\n: 1\n",
                "---\na: 1\n",
                "a: 1\na: 2\n",
                "\t- x\n",
                "%YAML 3.0\n---\n",
                "x: &x [*x]\n",
                "\u2028",
                "? {a: 1}\n: 2\n",
                "1: 2\n",
                "null: 1\n",
            )
        )
    elif chance < 0.13:
        text = "[" * draw.choice((100, 20_000)) + text
    elif chance < 0.14:
        text += "# " + "x" * 70_000
    elif chance < 0.15:
        text += "".join(f"key{i}: {i}\n" for i in range(5000))
    encoding = draw.choice(("utf-8",) * 12 + ("utf-16", "utf-8-sig", "utf-32"))
    data = text.encode(encoding, "surrogatepass")
    if draw.random() < 0.15:
        data = damaged(draw, data)
    elif draw.random() < 0.02:
        data = data + integer(draw, 4, 0)
    return data
