"""Pictures an hour of a batch on up to 1,000 cards, by a simulation of discrete events.

python -m benchmarks.batch_scaling

Nothing is painted, and no Ray is needed: every card paints for some seconds, then the driver takes
its picture, one after another over one network, before the card gets its next row. What the driver
takes was measured (`benchmarks/README.md`), the network is what it is sold as.
"""

import heapq
import random
from collections.abc import Iterator

CARDS = (1, 8, 64, 256, 1000)
SECONDS = (5, 15, 40)  # of a picture on a card
SPREAD = 0.05  # of these: cards of one kind are not equally warm
ROWS_A_CARD = 60
START = 30.0  # seconds until a worker has loaded its models, beside the first picture
DRIVER = 0.0053  # seconds of the driver for each picture that comes from another machine
PICTURE = 1.5e6  # bytes of a PNG of 1024x1024
NETWORKS = {"1 Gbit/s": 117e6, "10 Gbit/s": 1.17e9}  # bytes a second


def main() -> None:
    print("| Network | Seconds a picture |", " | ".join(f"{n} cards" for n in CARDS), "|")
    print("|---" * (2 + len(CARDS)) + "|")
    for network, speed in NETWORKS.items():
        for seconds in SECONDS:
            cells = [_cell(cards, seconds, PICTURE / speed) for cards in CARDS]
            print(f"| {network} | {seconds} |", " | ".join(cells), "|")


def _cell(cards: int, seconds: float, transfer: float) -> str:
    """Pictures an hour once all work, and their share of what as many lone cards paint."""
    *_, (start, end) = simulated(cards, seconds, transfer)
    rate = 3600 * cards * (ROWS_A_CARD - 1) / (end - start)
    return f"{rate:,.0f} ({rate * seconds / 3600 / cards:.0%})"


def simulated(cards: int, seconds: float, transfer: float) -> Iterator[tuple[float, float]]:
    """When the first picture and the last one so far were there, after each that came."""
    chance = random.Random(cards)

    def painted(begun: float) -> float:
        return begun + seconds * chance.uniform(1 - SPREAD, 1 + SPREAD)

    busy = [(painted(START), card) for card in range(cards)]  # until when each paints
    heapq.heapify(busy)
    waiting, driver, network, first = cards * (ROWS_A_CARD - 1), 0.0, 0.0, None
    while busy:
        done, card = heapq.heappop(busy)
        network = max(network, done) + transfer
        driver = max(driver, network) + DRIVER
        first = first or driver
        yield first, driver
        if waiting:
            waiting -= 1
            heapq.heappush(busy, (painted(driver), card))


if __name__ == "__main__":
    main()
