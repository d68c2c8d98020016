"""Do two clocks agree? Ours, and that of a store or a server."""

from datetime import UTC
from email.utils import parsedate_to_datetime

from cluster.doctor.finding import Finding

# Nothing of a run hangs on it, for leases compare no clocks; but times in records, in MLflow and
# of objects would contradict one another, and buckets refuse requests that are minutes off.
MAX_SKEW_S = 5.0


def check_clock(
    title: str, theirs: float, before: float, after: float, *, resolution_s: float = 0.0
) -> Finding:
    """Does a clock lie within what ours said before and after it was asked?

    Args:
        title: whose clock it is, such as "clock of the store".
        theirs: what it said; all in seconds since 1970.
        resolution_s: what it leaves out: 1 for clocks that tell whole seconds.
    """
    skew_s = max(before - theirs - resolution_s, theirs - after, 0.0)
    ahead = "ahead of" if theirs > after else "behind"
    found = f"{skew_s:.1f} s {ahead} ours" if skew_s >= 0.1 else "agrees with ours"
    if skew_s <= MAX_SKEW_S:
        return Finding(name=title, ok=True, found=found)
    remedy = "set both clocks by the same time server (`timedatectl set-ntp true`, chrony)"
    return Finding(name=title, ok=False, found=found, remedy=remedy)


def seconds_of_date(header: str) -> float:
    """Seconds since 1970 of an HTTP `Date`.

    Raises:
        ValueError: it is no date.
    """
    moment = parsedate_to_datetime(header)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
