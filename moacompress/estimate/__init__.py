"""What a command will take, said before it starts: rates of a model, measured once by a short probe, times how many of what.

`stopwatch` tells what work takes alone on a busy machine, `rates` what passes of a model take, `live_bytes` what they hold, and
`estimate` is what a person and a program are told. How many of what a command does stands beside the command.
"""
