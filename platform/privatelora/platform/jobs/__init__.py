"""Jobs: what is done once, by a worker here or by a device whose owner agrees.

    kinds.py       every kind that there is, found by its file
    machine.py     the states of a job
    runner.py      a worker's side: claims one, runs it, keeps its lease
    <kind>.py      a kind that workers run: KIND, and run(context) -> numbers

Kinds that devices run are files of `privatelora.device.jobs`, in the same form. A new kind is one file.
"""
