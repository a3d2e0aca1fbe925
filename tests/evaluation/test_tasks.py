"""Contract of every registered evaluation task, plugins included, and the checks of labels."""

import numpy as np
import pytest

from vjepa_fast.data.synthetic import SUITES
from vjepa_fast.errors import ConfigError, DataError
from vjepa_fast.evaluation import TASKS, get_task
from vjepa_fast.evaluation.probes.published import published_settings
from vjepa_fast.evaluation.run.probe import ProbeProtocol
from vjepa_fast.evaluation.tasks import Task, check_labels, check_within, class_names

EVERY = pytest.mark.parametrize("name", list(TASKS))


@EVERY
def test_a_task_is_usable_by_its_name(name):
    task = get_task(name)
    assert task.name == name and task.title and task.classes > 1
    assert min(task.num_frames or 1, task.frame_step or 1, task.clips, task.crops, task.epochs) >= 1
    assert check_labels(np.arange(task.classes), "m.csv", task=task) == task.classes
    with pytest.raises(DataError, match=f"m.csv: label {task.classes} is out of range"):
        check_labels(np.arange(task.classes + 1), "m.csv", task=task)
    p = ProbeProtocol(task=name).settled()
    assert (p.num_frames, p.frame_step, p.short) == (task.num_frames, task.frame_step, "hold")
    assert (p.clips, p.crops, p.epochs) == (task.clips, task.crops, task.epochs)
    assert ProbeProtocol(task=name, clips=7, epochs=3).settled().clips == 7  # what is given beside it wins
    assert ProbeProtocol(task=name, name="published").settled().epochs == published_settings(task).epochs


@EVERY
def test_class_lists_are_complete_and_in_label_order(name):
    task, names = TASKS[name], class_names(TASKS[name])
    assert (task.class_list is None) == (names == [])
    assert not names or (len(set(names)) == task.classes and names == sorted(names))


def test_published_classes_frames_and_views():
    found = {t.name: (t.classes, t.num_frames, t.frame_step, t.clips, t.crops, t.epochs) for t in TASKS.values()}
    assert found["diving48"] == (48, 32, 2, 4, 3, 100)
    assert found["ssv2"] == (174, 16, 4, 2, 3, 20)
    assert found["k400"] == (400, 16, 4, 8, 3, 20)
    for name in ("motion8", "dive", "order", "objects"):
        assert found[name] == (len(SUITES[name].classes), None, None, 1, 1, 20)
    assert class_names(get_task("k400"))[0] == "abseiling" and class_names(get_task("ucf101")) == []
    assert class_names(get_task("imagenet100"))[0] == "n01558993"


def test_a_task_of_ones_own(tmp_path):
    (tmp_path / "classes.txt").write_text("# mine\nleft\nright\n")
    task = Task("mine", "my task", 2, class_list=str(tmp_path / "classes.txt"))
    assert class_names(task) == ["left", "right"]
    with pytest.raises(DataError, match=r"no sample of label 1 \(right\); my task has 2 classes, found 1"):
        check_labels([0], "m.csv", task=task)
    with pytest.raises(TypeError, match="'other' must be a Task of that name"):
        TASKS.add("other", task)
    with pytest.raises(ValueError, match="evaluation task 'ssv2' is registered twice"):
        TASKS.add("ssv2", Task("ssv2", "another", 3))
    with pytest.raises(ConfigError, match="task: unknown evaluation task 'ssv3'; accepted: .*did you mean ssv2"):
        get_task("ssv3")


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
