"""Slurm's lists of hosts: `node[01-04,07],other` names six."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

_HOST = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")  # up to a comma outside brackets
_SEGMENT = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand_hosts(hosts: str) -> list[str]:
    """The names in a list of hosts, in its order, as `scontrol show hostnames` prints them.

    Numbers keep the width of their range's first one; of several brackets in a name the last varies fastest.

    Raises `ValueError` for a list that is not one.

    >>> expand_hosts("node[01-02,10],other")
    ['node01', 'node02', 'node10', 'other']
    >>> expand_hosts("rack[8-9]n[1-2]")
    ['rack8n1', 'rack8n2', 'rack9n1', 'rack9n2']
    """
    names = _HOST.findall(hosts)
    if ",".join(names) != hosts or not names:
        raise ValueError(f"{hosts!r} is not a list of hosts such as node[01-04,07],other")
    return [host for name in names for host in _expand_name(name)]


def _expand_name(name: str) -> Iterator[str]:
    choices = [[text] if text else [*_numbers(numbers)] for numbers, text in _SEGMENT.findall(name)]
    return ("".join(segments) for segments in product(*choices))


def _numbers(text: str) -> Iterator[str]:
    """`8-10,x` as numbers; raises `ValueError` for the x."""
    for item in text.split(","):
        matched = _RANGE.fullmatch(item)
        first, last = (matched[1], matched[2] or matched[1]) if matched else ("1", "0")
        if int(first) > int(last):
            raise ValueError(f"[{text}] has {item!r} for a number or a range of numbers such as 01-04")
        yield from (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
