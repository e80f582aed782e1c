"""The benchmark of a compressed checkpoint: how fast it is, and what memory it takes, beside the dense model.

`bench_request` (what is asked for, checked before anything is loaded), `sides` (the models and their caches), `graphs` (proof
that a compiled step is one graph), `measure` (turns of timing), `peak` (memory, in processes of their own), `cell_store`
(what is measured, kept on disk), `timing_rows` (what it comes to), `benchmark` (all of it). Serving has a scheduler of its own
(`serving`) for a mix of requests (`request_mix`) and the rows that run (`running_rows`); `serve_benchmark` is all of that. The
tables are in `moacompress.report`. Nothing here changes a plan or judges its quality.
"""
