"""A checkpoint of format version 1, which has no checksums of most tensors."""

from common import bert, doors, edit_config, outcome, saved, scratch, sparse


def older(config):
    block = config["quantization_config"]
    block["format_version"] = 1
    del block["tensors"], block["crc32"]


with scratch() as folder:
    checkpoint = saved(sparse(bert()), folder)
    edit_config(checkpoint, older)
    outcome(doors(checkpoint, folder))
