"""A crowd of devices on one real service: 200 come and go at random, and a tenth of them misbehave (`make soak`).

__main__.py      python -m tests.soak --seconds 600: the service, the warm-up, the crowd, the verdict
crowd.py         who comes when, from a seed; a process for each device, some of them killed
honest.py        devices that generate and train, and know what must come of every step
misbehaving.py   devices that vanish, stall, send garbage or flood, and how the service must answer
report.py        soak-out/report.json, the summary, and which promises were broken
"""
