"""What a command will take, said before it starts: the passes that it will run, times what one of each takes.

Each step lists its passes as `work` beside its code. `estimator` times one of each kind and length on this machine with the
`stopwatch` and multiplies; `live_bytes` counts what a pass holds, and `estimate` is what a person and a program are told.
"""
