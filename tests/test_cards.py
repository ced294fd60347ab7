from __future__ import annotations

import pytest

from unetlib import Preprocessing, UNet
from unetlib.cards import FRONT_MATTER_LIMIT, model_card, read_card, training_card
from unetlib.trust import TEXT_LIMIT


def read(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_card(tmp_path / "README.md")


def test_our_own_card_is_read(tmp_path):
    model = UNet(2, 3, (4, 6))
    model.preprocessing = Preprocessing(class_names=("sky", "road", "car"))
    card = model_card(model, "streets", "someone/streets")
    assert read(tmp_path, card) == {
        "library_name": "unetlib",
        "pipeline_tag": "image-segmentation",
        "tags": ["unet", "image-segmentation"],
    }
    for part in ("# streets\n", '"someone/streets"', "widths (4, 6), bottleneck 12", "2 channels in, 3 out", "sky, road, car"):
        assert part in card
    assert "Its classes: not named." in model_card(UNet(features=(2,)), "cars", "someone/cars")


def test_the_card_of_a_run_says_what_was_run_and_what_it_scores(tmp_path):
    scores = {"epoch": 3.0, "loss": 0.5, "dice": 0.98765, "iou": 0.97561, "accuracy": 0.99123}
    card = training_card(UNet(features=(2,)), "cars", "Finds cars.", scores, "python train.py --epochs 4", (90, 10))
    assert read(tmp_path, card)["library_name"] == "unetlib"
    for part in (
        "# cars\n", '"path/to/cars"', "\nFinds cars.\n", "```bash\npython train.py --epochs 4\n```\n",
        "90 pictures to train on; epoch 3 of", "10 validation pictures", "| 0.9877 | 0.9756 | 99.12% |",
    ):  # fmt: skip
        assert part in card


@pytest.mark.parametrize(("size", "said"), [(None, "at their own size"), ((160, 240), "at 160x240")])
def test_the_card_of_a_run_says_at_which_size_it_scores(size, said):
    scores = {"epoch": 3, "dice": 0.98, "iou": 0.961, "accuracy": 0.99}
    card = training_card(UNet(features=(2,)), "cars", "Finds cars.", scores, "python train.py", (90, 10), size)
    # Accuracy is that of all pixels together, as `SegmentationMetrics` has it.
    assert f"| 10 validation pictures {said} | Dice, mean of each | IoU, mean of each | accuracy of all pixels |" in card


@pytest.mark.parametrize(
    ("start", "base"),
    [(None, None), ("someone/cars", "someone/cars"), ("carvana", None), ("./runs/model", None), ("runs/unet.pth", None)],
)
def test_the_card_of_a_run_names_what_it_began_with(tmp_path, start, base):
    scores = {"epoch": 3, "dice": 0.98, "iou": 0.961, "accuracy": 0.99}
    card = training_card(UNet(features=(2,)), "cars", "Finds cars.", scores, "python train.py", (90, 10), start=start)
    data = read(tmp_path, card)
    assert (data.get("base_model"), data.get("base_model_relation")) == (base, base and "finetune")
    assert pytest.importorskip("huggingface_hub").ModelCard(card).data.base_model == base
    began = f", starting from `UNet.from_pretrained({start!r})`" if start else ""
    assert f"\n90 pictures to train on{began}; epoch 3 of\n" in card


def test_the_hubs_client_reads_it_too(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(model_card(UNet(features=(2,)), "a", "b/a"))
    data = card.data.to_dict()
    assert data["library_name"] == "unetlib"
    assert data["pipeline_tag"] == "image-segmentation"


@pytest.mark.parametrize(
    "text",
    ["", "# a", "text\n---\na: 1\n---\n", "---\n\n---\n", "---\nnever closed", "---\n---\n# a\nb: c: d\n---\n"],
)
def test_a_card_without_front_matter_has_no_data(tmp_path, text):
    assert read(tmp_path, text) == {}


@pytest.mark.parametrize("text", ["---\r\na: 1\r\n---\r\n", "\ufeff---\na: 1\n---\n", "---\na: 1\n---"])
def test_line_ends_and_marks_do_not_matter(tmp_path, text):
    assert read(tmp_path, text) == {"a": 1}


@pytest.mark.parametrize("most", ["x" * (FRONT_MATTER_LIMIT - len('a: ""\n')), "[" + 999 * "{", "{" + 999 * "["])
def test_front_matter_as_large_as_may_be_is_read(tmp_path, most):
    assert read(tmp_path, f'---\na: "{most}"\n---\n') == {"a": most}
    with pytest.raises(ValueError, match="more than 65,536 characters, or too many brackets"):
        read(tmp_path, f'---\na: "{most + most[-1]}"\n---\n')


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("---\na: [\n---\n", "expected"),
        ("---\n- a\n---\n", "must be a mapping, got a list"),
        ("---\na: !!bool maybe\n---\n", "maybe"),
        ("---\na: !!timestamp foo\n---\n", "groupdict"),
        ("---\na: !!int ''\n---\n", "index out of range"),
        ("---\na: 1" + 200 * ":00" + ".0\n---\n", "too large"),
        ("---\na: !!python/object/apply:os.mkdir [x]\n---\n", "could not determine a constructor"),
        ("---\na: &a [x]\nb: *a\n---\n", "aliases are not read"),
        ("---\na: " + 5000 * "[" + "\n---\n", "too many brackets"),
        ("---\na: " + 2**16 * "x" + "\n---\n", "more than 65,536 characters"),
        ("---\n" + 2000 * "- " + "\n---\n", "recursion"),
        (b"---\na: \xff\n---\n", "decode"),
        (b"x" * (TEXT_LIMIT + 1), "has more than 1,048,576 bytes"),
    ],
)
def test_front_matter_that_cannot_be_trusted_is_one_error(tmp_path, text, reason):
    with pytest.raises(ValueError, match=f"the front matter of .*{reason}"):
        read(tmp_path, text)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
