"""What moacompress knows about transformers and torch beyond their documented names; it imports nothing else of the runtime.

`private_names` lists every private name that the whole product leans on and what it is for, and looks for them under a version
of transformers that is not tested. `versions` lists the tested ones, `alternates` has what differs between them, `masks`
answers transformers' requests for a mask under a plan, and `http_errors` makes refusals that the client of a server reads.
"""
