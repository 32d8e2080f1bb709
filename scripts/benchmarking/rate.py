"""The machine's own matrix-product rate: FLOP per second of float32 products of 2048 x 2048, the median of ten.

python -m benchmarking.rate THREADS
"""

import statistics
import sys
import time

import torch

_SIZE, _NUM_PRODUCTS = 2048, 10


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    factor, product = torch.randn(_SIZE, _SIZE), torch.empty(_SIZE, _SIZE)
    seconds = []
    for _ in range(2 + _NUM_PRODUCTS):
        started = time.perf_counter()
        torch.mm(factor, factor, out=product)
        seconds.append(time.perf_counter() - started)
    print(2 * _SIZE**3 / statistics.median(seconds[2:]))


if __name__ == "__main__":
    main()
