"""What becomes of jobs, searches and builds that are sent while requests fare badly.

Servers of this machine answer 429, 500 or 503, break the line before or after the work, tear, garble or drip answers,
take no token, or do the work a moment late.

    PYTHONPATH=. python benchmarks/client_faults.py [FAULTS [SEED]]
"""

from __future__ import annotations

import os
import sys
import time

from tests.backends.vertex.soak import soak
from tests.servers.cloud import loopback_cloud


def main() -> None:
    """Print what befell the requests, and what there was in the end."""
    faults, seed = ([int(word) for word in sys.argv[1:]] + [1000, 0][len(sys.argv) - 1 :])[:2]
    with loopback_cloud(delays={"JOB_STATE_PENDING": 600}) as cloud:
        os.environ.update(cloud.environment)
        cloud.build.delay = 600.0
        started = time.perf_counter()
        outcome = soak(cloud, faults, seed=seed)
        took = time.perf_counter() - started
    print(f"{outcome.befell.total()} faults on {outcome.requests} requests in {took:.0f} s:")
    for kind, count in outcome.befell.most_common():
        print(f"  {kind:<12} {count}")
    print(
        f"{outcome.sent} sent: {outcome.succeeded} told of success, {outcome.in_doubt} of a doubt and how to look, "
        f"{outcome.failed} of failure; {len(outcome.wrong)} told wrong"
    )
    print(*outcome.wrong, sep="\n")


if __name__ == "__main__":
    main()
