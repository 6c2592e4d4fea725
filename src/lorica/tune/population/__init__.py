"""Many trials trained at once over one frozen base.

Users call `population`, which trains the trials, each in a coroutine (`coroutines`). `joint_layers` computes
a frozen layer once for the rows of all trials. `shared_base` loads the base once, and sends it to other
processes.
"""

from lorica.tune.population.population import Population as Population
