"""An activation changed by hand in config.json."""

from common import bert, doors, edit_config, outcome, saved, scratch, sparse

with scratch() as folder:
    checkpoint = saved(sparse(bert()), folder)
    modules = "bert.encoder.layer.0.output.dense"
    edit_config(checkpoint, lambda config: config["quantization_config"]["modules"][modules].update(activation="relu"))
    outcome(doors(checkpoint, folder))
