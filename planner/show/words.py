"""Numbers in words."""


def duration(seconds: float) -> str:
    """Return a time with four significant digits, in the unit that suits it."""
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.4g} {unit}"
    return f"{seconds:.4g} s"


def count_text(value: float) -> str:
    """Return a count with a decimal prefix, as ``218.1 M``."""
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.{2 if value / factor < 9.995 else 1}f}{prefix}"
    return f"{value:.0f}"
