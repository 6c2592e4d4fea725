"""One run in several processes, as torchrun or `lorica train --launch.processes` starts them.

group      which process this is; what the first does for all; what all agree on; how a lost one is told
batches    each step's rows, split over the processes; outputs put together again
cluster    Ray, started or joined, for those who train by it
rows       rows encoded by one process of a machine, and mapped into memory by the others
"""
