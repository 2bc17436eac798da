"""Keep an edit on disk: save, load, go on, roll back, and lose nothing.

A kept directory holds

    baft.safetensors                 the state: tensors, and in its metadata the latest journal
                                     entry, the configuration, and hashes of it all
    baft_config.json                 a copy of the configuration, for people and for the Hub
    journal.jsonl                    a line for each change, never rewritten
    checkpoints/00000100.safetensors earlier states, in the format of baft.safetensors
    lock                             locked while an editor has the directory open

A change is complete once `baft.safetensors` has been replaced, which happens as a whole or not at
all; everything else can be made again from it. There is no pickle: safetensors and JSON only.

`state` is the format, `journal` the entries, `reading` what needs no lock, `directory` the commits
and recovery, `fingerprint` says which model an edit belongs to, `loading` attaches it, `history`
changes it and goes back.
"""
