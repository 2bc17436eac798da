"""Benchmark files as EasyEdit request dicts.

| kind | file | probes beside the edit itself |
|---|---|---|
| `facts` | none, the package's own | rephrased, neighborhood, same_subject, unrelated, two_hop |
| `zsre` | zsre_mend_edit.json, zsre_mend_train.json | rephrased, neighborhood, one_hop |
| `knowedit-zsre` | ZsRE-test-all.json | rephrased, and KnowEdit's kinds |
| `wikidata-recent` | recent_test.json | rephrased, and KnowEdit's kinds |
| `wikidata-counterfact` | test_cf.json | rephrased, and KnowEdit's kinds |
| `wikibio` | wikibio-test-all.json | Relation_Specificity |
| `convsent` | blender_test.json | none |
| `counterfact` | ROME's layout or EasyEdit's | rephrased, neighborhood |
| `mquake` | MQuAKE-*.json | rephrased, multi_hop |
| `requests` | a list of request dicts | what they have |

No reader needs EasyEdit, a tokenizer or the network; the package brings no benchmark data but its
own facts.
"""

from baft_easyedit.bench.data.loading import DATASETS, Dataset, load_dataset

__all__ = ["DATASETS", "Dataset", "load_dataset"]
