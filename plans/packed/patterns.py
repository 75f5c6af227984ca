"""Patterns of module names (`re:...`) out of a `config.json` that nobody vouches for.

Python's regular expressions never give up: `re:(a+)+$` runs for years. How many ways there are to try a pattern is
bounded by its text, and more than a fixed number of ways is refused before anything is matched.
"""

import re
from collections.abc import Iterable

from plans.errors import InputError, printable

PREFIX = "re:"
MAX_WAYS = 2_000_000
MAX_LENGTH = 4096
_WAYS_OF_A_REPEAT = 16
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[:=!]|\(\?<[=!]|\(\?P?<\w+>|\{[0-9,]*\}|.", re.DOTALL)


def compile_patterns(texts: Iterable[str], *, where: object) -> tuple[re.Pattern[str], ...]:
    """Compile those of the names that are patterns, in their order; they match from a name's start.

    Raises:
        InputError: (E-QUANT) not a regular expression, or together they could take too long.

    Example:
        >>> [pattern] = compile_patterns(["re:.*mlp", "lm_head"], where="example")
        >>> bool(pattern.match("model.layers.0.mlp.up_proj"))
        True
    """
    found = [text.removeprefix(PREFIX) for text in texts if text.startswith(PREFIX)]
    if sum(map(ways, found)) > MAX_WAYS:
        raise _refused(max(found, key=ways), "could take too long to match", where)
    return tuple(_compile(text, where) for text in found)


def ways(pattern: str) -> int:
    """Return about how often a text is tried at most: a repeat counts 16, a choice of k counts k.

    >>> ways(".*mlp[.](up|down)_proj$"), ways("(a+)+$") > MAX_WAYS
    (32, True)
    """
    if len(pattern) > MAX_LENGTH:
        return MAX_WAYS + 1
    product, choices, before = 1, [1], ""
    for token in _TOKEN.findall(pattern):
        if token.startswith("("):
            choices.append(1)
        elif token == ")" and len(choices) > 1:
            product *= choices.pop()
        elif token == "|":
            choices[-1] += 1
        elif token == "?" and before not in ("*", "+", "?", "("):
            product *= 2
        elif token in ("*", "+") or token.startswith("{"):
            product *= MAX_WAYS + 1 if before == ")" else _WAYS_OF_A_REPEAT
        before = token
    for choice in choices:
        product *= choice
    return product


def _compile(pattern: str, where: object) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _refused(pattern, f"is not a regular expression: {error}", where) from None


def _refused(pattern: str, why: str, where: object) -> InputError:
    return InputError(
        f"the pattern '{printable(pattern, limit=60)}' {printable(why)}",
        where=where,
        expected="names, and patterns with few repeats and choices",
        code="E-QUANT",
    )
