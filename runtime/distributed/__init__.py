"""One process per stage: the chain over torch.distributed, on one machine or several.

`runtime.distributed.session.ProcessSession` stands where a `runtime.session.Session` would; `runtime.worker` is the
program the other stages run. Hidden states and token ids travel over `links`, everything else over the control
connection that each worker keeps to the driver (the first stage).
"""
