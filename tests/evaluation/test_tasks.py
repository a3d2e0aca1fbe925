import numpy as np
import pytest

from vjepa_fast.data.synthetic import SUITES
from vjepa_fast.errors import DataError, UserError
from vjepa_fast.evaluation import TASKS, get_task
from vjepa_fast.evaluation.tasks import check_labels, check_within, class_names


def test_classes_frames_and_views():
    found = {t.name: (t.classes, t.num_frames, t.frame_step, t.clips, t.crops, t.epochs) for t in TASKS.values()}
    assert found["diving48"] == (48, 32, 2, 4, 3, 100)
    assert found["ssv2"] == (174, 16, 4, 2, 3, 20)
    assert found["k400"] == (400, 16, 4, 8, 3, 20)
    assert found["imagenet100"][0] == 100 and found["ucf101"][0] == 101
    for name in ("motion8", "dive", "order", "objects"):
        assert found[name] == (len(SUITES[name].classes), None, None, 1, 1, 20)
    with pytest.raises(UserError, match="unknown task 'hmdb'; choose from diving48, ssv2"):
        get_task("hmdb")


def test_class_lists_are_complete_and_in_label_order():
    for name in ("diving48", "ssv2", "k400", "imagenet100"):
        names = class_names(get_task(name))
        assert len(set(names)) == TASKS[name].classes and names == sorted(names)
    assert class_names(get_task("k400"))[0] == "abseiling" and class_names(get_task("ucf101")) == []


def test_labels_of_a_training_part():
    assert check_labels([0, 1, 2, 1], "m.csv") == 3
    assert check_labels(np.arange(48), "m.csv", task=get_task("diving48")) == 48
    with pytest.raises(DataError, match="m.csv: no samples"):
        check_labels([], "m.csv")
    with pytest.raises(DataError, match=r"m.csv: no sample of label 1, 3; number the classes 0, 1, 2"):
        check_labels([0, 2, 4], "m.csv")
    with pytest.raises(DataError, match=r"label 48 is out of range; Diving-48 has 48 classes, labels 0 to 47"):
        check_labels(np.arange(49), "m.csv", task=get_task("diving48"))
    few = np.delete(np.arange(400), [0, 5])
    with pytest.raises(DataError, match=r"label 0 \(abseiling\), 5 \(.*Kinetics-400 has 400 classes, found 398"):
        check_labels(few, "m.csv", task=get_task("k400"))
    with pytest.raises(DataError, match="and 43 more"):
        check_labels([0, 47], "m.csv", classes=50)


def test_labels_of_a_test_part():
    check_within([0, 2], "t.csv", 3)
    with pytest.raises(DataError, match="t.csv: label 3 is none of the training part, which has 0 to 2"):
        check_within([0, 3], "t.csv", 3)
    with pytest.raises(DataError, match="t.csv: no samples"):
        check_within([], "t.csv", 3)
