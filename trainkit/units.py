"""Numbers as people read them."""


def human_bytes(number: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(number) < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


def human_count(number: float) -> str:
    """`124_439_808` -> `124.4M`."""
    for unit in ("", "K", "M", "B", "T"):
        if abs(number) < 1000 or unit == "T":
            break
        number /= 1000
    return f"{number:.0f}{unit}" if unit == "" else f"{number:.1f}{unit}"


def human_time(seconds: float) -> str:
    """`3725` -> `1h02m`."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole:02d}s" if minutes else f"{whole}s"
