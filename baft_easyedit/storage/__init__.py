"""Keep edits on disk: save, load, continue and roll back an edit, safe against crashes.

An edit's directory (a "kept directory") holds

    baft.safetensors                 the state: tensors, and in its metadata the latest journal
                                     entries, the configuration, and hashes of all three
    baft_config.json                 a copy of the configuration, for people and for the Hub
    journal.jsonl                    one line for each change; lines are only appended
    checkpoints/00000100.safetensors earlier states, in the format of baft.safetensors
    lock                             locked while an editor has the directory open

The trick: a change is committed by one atomic replacement of `baft.safetensors`, which carries the
journal entries that `journal.jsonl` lacks; the next opening completes the other files from it.
There is no pickle: safetensors and JSON only.

`state` defines the format of a state file, `journal` the entries; `reading` reads without a lock;
`directory` commits and recovers; `fingerprint` tells which model an edit belongs to; `loading`
attaches an edit; `history` makes changes and undoes them; `hub` uploads.
"""
