"""One bit of a tensor that is in no sparse layer: an embedding, a norm, a head."""

from common import WEIGHTS, bert, doors, outcome, saved, scratch, sparse

from sparsenlp.tensor_files import open_tensors

NAMES = (
    "bert.embeddings.word_embeddings.weight",
    "bert.encoder.layer.1.output.LayerNorm.weight",
    "classifier.weight",
)

with scratch() as folder:
    checkpoint = saved(sparse(bert()), folder)
    raw = (checkpoint / WEIGHTS).read_bytes()
    with open_tensors([checkpoint / WEIGHTS]) as files:
        places = {name: files.stored(name).offset for name in NAMES}
    answers = {}
    for name, place in places.items():
        (checkpoint / WEIGHTS).write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        answers.update({f"{door}, {name.split('.')[-2]}": answer for door, answer in doors(checkpoint, folder).items()})
    outcome(answers)
