"""Numbers as people read them; a value that is not there is a dash."""


def short(value: float) -> str:
    """8030261248 -> "8.03B"; below ten thousand the number itself."""
    for unit, factor, least in (("B", 1e9, 1e9), ("M", 1e6, 1e6), ("k", 1e3, 1e4)):
        if abs(value) >= least:
            return f"{value / factor:.3g}{unit}"
    return f"{value:g}"


def size(count: float | None) -> str:
    """Bytes: 1536 -> "1.5 KiB"."""
    if count is None:
        return "-"
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 2**power:
            return f"{count / 2**power:,.1f} {unit}"
    return f"{count} B"


def duration(seconds: float | None) -> str:
    """75 -> "1 min 15 s"."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:,.1f} days"
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds) % 60} s"
