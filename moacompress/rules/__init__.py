"""What a KV head keeps, and what that costs: windows, rules, a model's shape, candidates, budgets, plans. No torch.

`windows` is the one definition of window, visible, kept and slots; `rule`, `model_shape` and `plan` say it of a KV head, a
model and all its KV heads; `candidates` is what is on offer, `cost` what it takes in bytes, `budget` and `limits` what it may
take. Nothing here measures, loads or runs a model.
"""
