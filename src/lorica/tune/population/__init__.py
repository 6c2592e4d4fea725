"""Many trials trained at once over one frozen base.

Users call `population`. `runner` trains the trials, each in a coroutine (`coroutines`). `joint_layers` and
`joint_linear` compute a frozen layer once for the rows of all trials. `shared_base` loads the base once, and
`packed_model` sends it to another process.
"""

from lorica.tune.population.population import Population as Population
