"""What moacompress knows about transformers and torch beyond their documented names; it imports nothing else of the runtime.

`private_names` lists every private name that the whole product leans on and what it is for, `checks` says what a check of one
can look at. `versions` lists the versions of transformers that are tested, `alternates` has what differs between them, and
`untested` looks at any other one first. `mask_functions` reads the masks that transformers composes, `masks` answers its
requests for one under a plan, `capturing` says which of its hooks on a layer do something, and `http_errors` makes refusals
that the client of a server reads.
"""
