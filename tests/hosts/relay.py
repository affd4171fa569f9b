"""Carries packets between two network devices that it makes, port0 and port1, late, and not all.

    relay.py DELAY LOSS

DELAY is in seconds, LOSS the part of the packets that is lost. Says "ready" when there are devices.
"""

import collections
import contextlib
import fcntl
import os
import random
import select
import struct
import sys
import time

TUNSETIFF, TAP, NO_HEADER = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h
LONGEST = 65536


def device(name):
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP | NO_HEADER))
    return file


delay, loss = float(sys.argv[1]), float(sys.argv[2])
chance = random.Random(0)
ports = [device("port0"), device("port1")]
print("ready", flush=True)
waiting = collections.deque()  # when to hand it over, to which device, the packet
while True:
    pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
    for port in select.select(ports, [], [], pause)[0]:
        with contextlib.suppress(OSError):  # BlockingIOError; a device that is down
            packet = os.read(port, LONGEST)
            if chance.random() >= loss:
                waiting.append((time.monotonic() + delay, ports[port == ports[0]], packet))
    while waiting and waiting[0][0] <= time.monotonic():
        _, port, packet = waiting.popleft()
        with contextlib.suppress(OSError):
            os.write(port, packet)
