"""Benchmarks to rows: what is in the files is in the rows, and what is wrong with them is named by line."""

import csv
import json
import warnings
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

import conftest
from photon.evaluation import questions
from photon.evaluation.row import inline_options
from photon.evaluation.scans import missing_volumes, patient_of
from photon.rows import RowError
from photon.training.data import load_rows

DATA = conftest.DATA / "3d_rad"
COLUMNS = (
    "Task,Subtask,VolumeName,Question,Answer,QuestionType,AnswerChoice,Choice A,Choice B,Choice C,Choice D".split(",")
)
NODULE = {
    "Task": "4", "Subtask": "10", "VolumeName": "test_12_b_1.nii.gz", "Question": "Is lung nodule noted?",
    "Answer": "No", "QuestionType": "Close", "AnswerChoice": "B", "Choice A": "Yes", "Choice B": "No", "Choice C": "-",
    "Choice D": "-",
}  # fmt: skip
SIZE = dict.fromkeys(COLUMNS, "-") | {
    "Task": "3", "Subtask": "2", "VolumeName": "test_7_a_2.nii.gz", "Question": 'How large, "in mm"?',
    "Answer": "30x13 mm", "QuestionType": "Open",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def write_csv(path, records, columns=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns or list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return path


def rad(folder, *records, task="Task4_Existence_Detection", name="Lung nodule"):
    write_csv(folder / task / f"{name}.csv", records or [NODULE], COLUMNS)
    return folder


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return str(path)


def faults(name, source, **options):
    with pytest.raises(RowError) as caught:
        questions.load_benchmark(name, source, **options)
    return str(caught.value)


# === 3D-RAD ==========================================================================================================


@pytest.mark.filterwarnings("ignore:.*stand in the files more than once")
def test_3d_rad_holds_every_question_of_its_files(tmp_path):
    if not DATA.is_dir():
        pytest.skip("3D-RAD questions are not here; set PHOTON_TEST_DATA to a folder with 3d_rad")
    rows = questions.load_benchmark("3d-rad", DATA, volumes=tmp_path)
    assert len({row["id"] for row in rows}) == len(rows)
    places = {(row["subtask"], row["task"], int(row["id"][-5:])): row for row in rows}
    names = dict(zip("123456", questions.BENCHMARKS["3d-rad"].tasks, strict=True))
    count = 0
    for file in DATA.glob("*/*.csv"):
        with open(file, encoding="utf-8-sig", newline="") as stream:
            for number, record in enumerate(csv.DictReader(stream), start=1):
                row = places[file.stem, names[file.parent.name[4]], number]
                asked = row["messages"][0]["content"][1]["text"]
                assert asked.startswith(record["Question"]) and row["question"] == record["Question"]
                assert row["messages"][0]["content"][0] == {"type": "volume"}
                assert row["messages"][1] == {
                    "role": "assistant", "content": [{"type": "text", "text": row["answer"]}]
                }  # fmt: skip
                patient = "_".join(record["VolumeName"].split("_")[:2])
                assert row["patient"] == patient
                if record["QuestionType"] == "Close":
                    listed = [f"{x}. {record[f'Choice {x}']}" for x in "ABCD" if record[f"Choice {x}"] != "-"]
                    assert asked.split("\n")[1:-1] == listed
                    assert (
                        row["options"][row["answer"]] == record["Answer"] and row["answer"] == record["AnswerChoice"]
                    )
                    assert row["kind"] == "choice" and row["choices"] == [line[0] for line in listed]
                else:
                    assert asked == record["Question"] and row["answer"] == record["Answer"]
                    assert (row["kind"], row["options"], row["choices"]) == ("text", None, None)
                count += 1
    assert count == len(rows) == 1582 and len({(row["task"], row["subtask"]) for row in rows}) == 41
    scans = {Path(row["volumes"][0]).name for row in rows}
    assert len(missing_volumes(rows)) == len(scans) == 232


@pytest.mark.filterwarnings("ignore:.*stand in the files more than once")
def test_rows_are_rows_of_the_training_format(tmp_path):
    """Written as JSONL they load for training, and as a benchmark of their own they are the same questions."""
    if not DATA.is_dir():
        pytest.skip("3D-RAD questions are not here; set PHOTON_TEST_DATA to a folder with 3d_rad")
    rows = questions.load_benchmark("3d-rad", DATA, volumes=tmp_path, tasks=["existence", "Medical Computation"])
    assert Counter(row["task"] for row in rows) == {"existence": 720, "medical-computation": 120}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    trained = load_rows(file)
    assert [row["answer"] for row in trained] == [row["answer"] for row in rows]
    assert [row["volumes"][0]["path"] for row in trained] == [row["volumes"][0] for row in rows]
    again = questions.load_benchmark("jsonl", file)
    assert again == [{**row, "benchmark": "jsonl"} for row in rows]


def test_scans_are_found_by_name_at_any_depth(tmp_path):
    files = rad(tmp_path / "q", NODULE, NODULE | {"VolumeName": "test_3_a_1.nii.gz"})
    rad(files, SIZE, task="Task3_Medical_Computation", name="Size")
    nested = touch(tmp_path / "v" / "dataset" / "valid_fixed" / "valid_12" / "valid_12_b" / "valid_12_b_1.nii.gz")
    flat = touch(tmp_path / "v" / "test_7_a_2.nii.gz")  # by its own name
    touch(tmp_path / "v" / "valid_7_a_2.npy")  # no scan
    touch(tmp_path / "v" / "valid_3_a_1.json")
    rows = questions.load_benchmark("3d-rad", files, volumes=tmp_path / "v")
    assert [row["volumes"] for row in rows] == [
        [flat],
        [nested],
        [str(tmp_path / "v/valid_3/valid_3_a/valid_3_a_1.nii.gz")],
    ]
    assert missing_volumes(rows) == rows[2]["volumes"]
    report = questions.missing_report(rows, "3d-rad")
    assert report.startswith("1 of 3 scans are missing: 3.\n") and "valid_3_a" not in report
    for part in ("ibrahimhamamci/CT-RATE", "CC BY-NC-SA", "MIT", "hf download"):
        assert part in report
    assert questions.missing_report(rows[:2], "3d-rad") == ""
    touch(tmp_path / "v" / "dataset" / "valid" / "valid_12_b_1.nii.gz")
    message = faults("3d-rad", files, volumes=tmp_path / "v")
    assert "Lung nodule.csv line 2: its scan is in 2 places" in message and "valid_12" not in message


def test_missing_scans_are_listed_by_number():
    assert questions.ranges([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"
    assert questions.ranges(list(range(1, 200, 2))).endswith("... and 60 more ranges")


BAD = {
    "its Task is '5' in a file of task 4": {"Task": "5"},
    "its answer 'E' is none of the choices A, B": {"AnswerChoice": "E"},
    "its answer 'C' is none of the choices A, B": {"AnswerChoice": "C"},
    "the letter is A, but the answer's text is that of B": {"AnswerChoice": "A"},
    "the answer's text is none of the options A, B": {"Answer": "Perhaps"},
    "expected Open or Close": {"QuestionType": "Closed?"},
    "it is closed, but has 1 options": {"Choice A": "-"},
    "its scan's name is not like": {"VolumeName": "scan.nii.gz"},
    "its question is empty": {"Question": ""},
}


@pytest.mark.parametrize("expected", BAD)
def test_faulty_questions_are_named_by_line(tmp_path, expected):
    long = NODULE | {"Question": "Two\nlines?"}  # the faulty record is the third, on line 5
    rad(tmp_path, NODULE, long, NODULE | BAD[expected], NODULE | {"VolumeName": "test_9_a_1.nii.gz"})
    message = faults("3d-rad", tmp_path)
    assert "Task4_Existence_Detection/Lung nodule.csv line 5: " in message and expected in message
    assert message.startswith("1 faulty questions") and "test_12" not in message
    with pytest.warns(UserWarning, match="1 questions of 3d-rad were left out:\n.*line 5"):
        rows = questions.load_benchmark("3d-rad", tmp_path, faults="leave-out")
    assert [row["id"][-5:] for row in rows] == ["00001", "00002", "00004"]  # numbers do not move


def test_faulty_files_are_named(tmp_path):
    file = write_csv(
        tmp_path / "a" / "Task4_x" / "Lung nodule.csv", [{k: v for k, v in NODULE.items() if k != "Choice B"}]
    )
    assert "Lung nodule.csv line 1: no column Choice B; there are" in faults("3d-rad", tmp_path / "a")
    file.write_text(",".join(COLUMNS) + "\n4,1,test_1_a_1.nii.gz,Unquoted, comma?,No,Close,B,Yes,No,-,-\n4,1\n")
    message = faults("3d-rad", tmp_path / "a")
    assert "line 2: its fields are not as many as the 11 columns" in message and "line 3: its fields" in message
    file.write_bytes(",".join(COLUMNS).encode() + b"\n\xff\xfe\n")
    assert "not UTF-8" in faults("3d-rad", tmp_path / "a")
    rad(tmp_path / "b", task="Task7_Other")
    assert "Task7_Other is no task of 3D-RAD" in faults("3d-rad", tmp_path / "b")
    (tmp_path / "empty").mkdir()
    message = faults("3d-rad", tmp_path / "empty")
    assert "no Task*_*/*.csv" in message and "Tang-xiaoxiao/3D-RAD" in message
    rad(rad(tmp_path / "c" / "one").parent / "two")
    assert "existence Lung nodule is there twice" in faults("3d-rad", tmp_path / "c")


def test_unknown_names_are_refused(tmp_path):
    rad(tmp_path)
    known = ", ".join(sorted(questions.BENCHMARKS))
    assert "3d-rad" in known and "deeptumorvqa-1-mc" in known and f"known are {known}." in faults("3drad", tmp_path)
    assert "has no task existance; known: image-observation" in faults("3d-rad", tmp_path, tasks=["existance"])
    assert "no question of static-temporal" in faults("3d-rad", tmp_path, tasks=["existence", "static-temporal"])
    assert "has no split 'dev'" in faults("3d-rad", tmp_path, split="dev")
    assert "revision is for a Hub id" in faults("3d-rad", tmp_path, revision="main")
    with pytest.raises(ValueError, match="limit=0"):
        questions.load_benchmark("3d-rad", tmp_path, limit=0)
    with pytest.raises(FileNotFoundError, match="give their folder or file, or a Hub id like Tang-xiaoxiao/3D-RAD"):
        questions.load_benchmark("3d-rad", tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="volumes is not a folder"):
        questions.load_benchmark("3d-rad", tmp_path, volumes=tmp_path / "absent")
    with pytest.raises(RowError, match="known are"):
        questions.what_to_download("x")


def test_train_and_test_are_kept_apart(tmp_path):
    rad(tmp_path / "3DRAD" / "test")
    rad(tmp_path / "3DRAD" / "train", NODULE | {"VolumeName": "train_5_a_1.nii.gz"}, NODULE)
    (test,) = questions.load_benchmark("3d-rad", tmp_path)
    train = questions.load_benchmark("3d-rad", tmp_path, split="train", limit=1)
    assert test["id"] == "3d-rad/existence/lung-nodule/00001" and test["patient"] == "test_12"
    assert [row["id"] for row in train] == ["3d-rad-train/existence/lung-nodule/00001"]
    assert train[0]["patient"] == "train_5" and Path(train[0]["volumes"][0]).name == "train_5_a_1.nii.gz"
    assert len(questions.load_benchmark("3d-rad", tmp_path / "3DRAD" / "train", split="train")) == 2
    assert "is that of 'test'" in faults("3d-rad", tmp_path / "3DRAD" / "test", split="train")


def test_a_repeated_question_is_kept_and_counted(tmp_path):
    other = NODULE | {"Answer": "Yes", "AnswerChoice": "A"}
    elsewhere = NODULE | {"VolumeName": "test_12_b_2.nii.gz"}
    rad(tmp_path, NODULE, other, elsewhere, elsewhere, SIZE | {"Task": "4"})
    with pytest.warns(UserWarning, match="2 questions stand in the files more than once for one scan, 1 of them with"):
        rows = questions.load_benchmark("3d-rad", tmp_path)
    assert len(rows) == 5 and len({row["id"] for row in rows}) == 5


def test_a_hub_id_fetches_questions_and_no_scans(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def stand_in(repo_id, **options):
        asked.append((repo_id, options))
        return str(rad(tmp_path / "snapshot" / "test").parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
    monkeypatch.chdir(tmp_path)
    (row,) = questions.load_benchmark("3d-rad", "Tang-xiaoxiao/3D-RAD", revision="abc", volumes=tmp_path)
    ((repo_id, options),) = asked
    assert repo_id == "Tang-xiaoxiao/3D-RAD" and options["revision"] == "abc" and options["repo_type"] == "dataset"
    assert options["allow_patterns"] and all(p.endswith(".csv") for p in options["allow_patterns"])
    assert row["answer"] == "B"


# === DeepTumorVQA ====================================================================================================

STEATOSIS = "How severe is it? A: None B: Mild C: 12.5 HU D: Severe"
TUMOR1 = {
    "Image ID": "BDMAP_00000007", "question type": "measurement", "question subtype": "organ HU measurement",
    "question": "What is the HU?", "answer": "12.50", "multiple-choice question": STEATOSIS, "correct option": "C",
}  # fmt: skip
TUMOR2 = {
    "qid": "bench_00017", "image_id": "BDMAP_00000008", "spacing": "[0.8 0.8 5.0]", "shape": "(512, 512, 116)",
    "sex": "F", "age": None, "question": "What is the volume?", "answer": "12.5", "mc_question": STEATOSIS,
    "correct_option": "C", "question_type": "measurement", "question_subtype": "organ volume measurement",
}  # fmt: skip


def test_deeptumorvqa_1_from_a_table(tmp_path):
    file = write_csv(tmp_path / "val.csv", [TUMOR1, TUMOR1 | {"Image ID": "BDMAP_00000009", "question subtype": "x"}])
    scan = touch(tmp_path / "ct" / "BDMAP_00000007" / "ct.nii.gz")
    choice, _ = questions.load_benchmark("deeptumorvqa-1-mc", file)
    assert choice["volumes"] == [scan] and choice["patient"] == "BDMAP_00000007"
    assert choice["options"] == {"A": "None", "B": "Mild", "C": "12.5 HU", "D": "Severe"} and choice["answer"] == "C"
    assert choice["messages"][0]["content"][1]["text"] == STEATOSIS and choice["question"] == "How severe is it?"
    free, other = questions.load_benchmark("deeptumorvqa-1-ft", tmp_path)  # the folder's val*.csv
    assert (free["kind"], free["answer"], other["kind"]) == ("number", "12.50", "text")
    assert (free["task"], free["subtask"]) == ("measurement", "organ HU measurement")
    columns = [name for name in TUMOR1 if name != "correct option"]
    write_csv(file, [{name: TUMOR1[name] for name in columns}])
    message = faults("deeptumorvqa-1-mc", file)
    assert "val.csv line 1: no column correct option or correct_option" in message
    write_csv(tmp_path / "val_2.csv", [TUMOR1])
    assert "2 files could be deeptumorvqa-1-ft val: val.csv, val_2.csv" in faults("deeptumorvqa-1-ft", tmp_path)


def test_deeptumorvqa_1_as_photon_releases_it(tmp_path):
    line = {
        "messages": [
            {"role": "user", "content": f"<video> {STEATOSIS}"}, {"role": "assistant", "content": "B. Mild"}
        ],
        "videos": ["anywhere/BDMAP_00000007/ct.nii.gz"], "question type": "recognition",
        "question subtype": "fatty liver",
    }  # fmt: skip
    flat = touch(tmp_path / "scans" / "BDMAP_00000007.nii.gz")
    (tmp_path / "val_multi_choice.jsonl").write_text(json.dumps(line) + "\n")
    (row,) = questions.load_benchmark("deeptumorvqa-1-mc", tmp_path)
    assert row["answer"] == "B" and row["volumes"] == [flat] and row["options"]["D"] == "Severe"
    assert row["messages"][0]["content"][1]["text"] == STEATOSIS
    wrong = {**line, "messages": [*line["messages"], {"role": "user", "content": "?"}]}
    lines = [json.dumps(line), "{", json.dumps(wrong), json.dumps({**line, "videos": []}), "3"]
    (tmp_path / "val_multi_choice.jsonl").write_text("\n".join(lines))
    message = faults("deeptumorvqa-1-mc", tmp_path)
    for part in (
        "line 2: not JSON",
        "line 3: its messages are not one question",
        "line 4: it names no scan",
        "line 5: not a",
    ):
        assert f"val_multi_choice.jsonl {part}" in message


def test_deeptumorvqa_2_asks_as_its_authors_do(tmp_path):
    reasoning = TUMOR2 | {"qid": "bench_2", "question_subtype": "fatty liver", "question_type": "medical reasoning"}
    file = tmp_path / "benchmark" / "test_qa.json"
    file.parent.mkdir()
    file.write_text(
        json.dumps({"version": 4, "questions": [TUMOR2, reasoning | {"answer": "Mild", "correct_option": "B"}]})
    )
    scan = touch(tmp_path / "benchmark" / "ct" / "BDMAP_00000008" / "ct.nii.gz")
    row, other = questions.load_benchmark("deeptumorvqa-2", tmp_path)
    assert row["id"] == "deeptumorvqa-2/bench_00017" and row["volumes"] == [scan] and row["answer"] == "C"
    assert row["messages"][0]["content"][1]["text"] == (
        "You are given the full 3D abdominal CT volume (NIfTI, native voxel spacing).\nPatient: sex=F.\n"
        "Voxel spacing (mm): [0.8 0.8 5.0].  Volume shape: (512, 512, 116).\n"
        f"{STEATOSIS}\nAnswer with ONLY the single letter (A, B, C, or D)."
    )
    assert "Voxel spacing" not in other["messages"][0]["content"][1]["text"]
    free, words = questions.load_benchmark("deeptumorvqa-2-ft", tmp_path)
    assert (free["kind"], free["answer"], words["kind"]) == ("number", "12.5", "text")
    assert words["messages"][0]["content"][1]["text"].endswith("Answer with the most appropriate short phrase.")
    assert questions.load_benchmark("deeptumorvqa-2", tmp_path, tasks=["medical reasoning"]) == [other]
    bad = [TUMOR2, TUMOR2, TUMOR2 | {"qid": "q3", "correct_option": "E"}, {"qid": "q4"}, "x"]
    file.write_text(json.dumps({"questions": bad}))
    message = faults("deeptumorvqa-2", tmp_path)
    parts = ["question 2: its id is that of", "question 3: its answer 'E' is none", "question 4: no 'question_type'"]
    for part in [*parts, "question 5: not a JSON object"]:
        assert part in message
    file.write_text('{"questions": 3}')
    assert "expected a list" in faults("deeptumorvqa-2", tmp_path)


def test_a_letter_against_the_text_is_counted_where_texts_are_machine_made(tmp_path):
    file = tmp_path / "test_qa.json"
    file.write_text(json.dumps([TUMOR2, TUMOR2 | {"qid": "b", "image_id": "BDMAP_2", "answer": "Mild"}]))
    with pytest.warns(
        UserWarning, match="1 questions whose letter and .*\n.*question 2: the letter is C, but .* of B"
    ):
        rows = questions.load_benchmark("deeptumorvqa-2", file)
    assert [row["answer"] for row in rows] == ["C", "C"] and all("answer_text" not in row for row in rows)


@pytest.mark.parametrize(
    ("text", "options", "stem"),
    [
        ("How? A: Normal B: Moderate, or so C: Severe", ["Normal", "Moderate, or so", "Severe"], "How?"),
        ("Vitamin A? (a) one (b) two (c) x (d) E. coli", ["one", "two", "x", "E. coli"], "Vitamin A?"),
        ("Which? (a) B. cereus (b) none", ["B. cereus", "none"], "Which?"),
        ("Hepatitis A: true?\nA. Yes\nB. No", ["Yes", "No"], "Hepatitis A: true?"),
        ("Which is A: this", None, "Which is A: this"),
        ("None", None, "None"),
    ],
)
def test_options_within_a_question(text, options, stem):
    found, question = inline_options(text)
    assert question == stem
    assert found == (options and dict(zip("ABCD", options, strict=False)))


# === M3D-VQA, CT-RATE VQA, own questions =============================================================================

M3D = {
    "Image Path": "M3D_Cap_npy/ct_quizze/000006/Axial_C.npy", "Text": "A report,\nwith lines", "Question Type": "4",
    "Question": "What is seen?", "Choice A": "Cyst", "Choice B": "NA", "Choice C": "Stone", "Choice D": "Mass",
    "Answer": "stone.", "Answer Choice": "C",
}  # fmt: skip


def test_m3d_vqa(tmp_path):
    file = write_csv(tmp_path / "M3D_VQA_test.csv", [M3D, M3D | {"Question Type": "1"}])
    touch(tmp_path / "other" / "000005" / "Axial_C.nii.gz")
    scan = touch(tmp_path / "scans" / "ct_quizze" / "000006" / "Axial_C.nii.gz")
    touch(tmp_path / "scans" / "ct_quizze" / "000006" / "Axial_C.npy")
    row, plane = questions.load_benchmark("m3d-vqa", tmp_path)
    assert row["volumes"] == [scan] and row["patient"] == "ct_quizze/000006" and plane["task"] == "plane"
    assert row["options"] == {"A": "Cyst", "C": "Stone", "D": "Mass"} and row["answer"] == "C"
    assert row["messages"][0]["content"][1]["text"].split("\n")[:2] == ["What is seen?", "A. Cyst"]
    write_csv(file, [M3D, M3D | {"Question Type": "6"}, M3D | {"Answer Choice": "B"}])
    message = faults("m3d-vqa", tmp_path)
    assert "line 4: its Question Type is '6'; expected 1 to 5" in message  # a record has two lines here
    assert "line 6: its answer 'B' is none of the choices A, C, D" in message


def turn(question, answer, kind=None):
    asked = {"from": "human", "value": question}
    return [asked | ({"type": kind} if kind else {}), {"from": "gpt", "value": answer}]


def test_ct_rate_vqa(tmp_path):
    entries = [
        {"id": "multiple_choice_1", "image": "valid_3_b_2.nii.gz", "conversations": [
            *turn("<image>\nWhich?\n(a) one (b) two (c) 3 (d) four <multiple_choice>", "(b) two", "multiple_choice"),
            *turn("And? (a) x (b) y <multiple_choice>", "(a) x", "multiple_choice")]},
        {"id": "conversation_1", "image": "valid_4_a_1.nii.gz", "conversations": [
            *turn("<image>\nFirst?<long_answer>", "One.", "conversation"),
            *turn("Second?<long_answer>", "Two.", "conversation")]},
        {"id": "report_generation_1", "image": "valid_4_a_1.nii.gz",
         "conversations": turn("<image>\nReport.<report_generation>", "All well.")},
    ]  # fmt: skip
    file = tmp_path / "dataset" / "vqa" / "valid_vqa.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(entries))
    scan = touch(tmp_path / "valid_fixed" / "valid_3" / "valid_3_b" / "valid_3_b_2.nii.gz")
    first, second, third, fourth, report = questions.load_benchmark("ct-rate-vqa", tmp_path)
    assert first["id"] == "ct-rate-vqa/multiple_choice_1/1" and first["volumes"] == [scan] == second["volumes"]
    assert first["answer"] == "B" and first["options"]["D"] == "four" and first["patient"] == "valid_3"
    assert second["answer"] == "A" and len(second["messages"]) == 2  # stands alone
    assert third["question"] == "First?" and len(third["messages"]) == 2
    texts = [[part.get("text", part["type"]) for part in message["content"]] for message in fourth["messages"]]
    assert texts == [["volume", "First?"], ["One."], ["Second?"], ["Two."]] and fourth["answer"] == "Two."
    assert report["task"] == "report-generation" and report["kind"] == "text" and report["question"] == "Report."
    bad = [entries[0], entries[0], {**entries[2], "id": "r", "image": "x.nii.gz"}]
    bad.append({"id": "m", "image": "valid_1_a_1.nii.gz", "conversations": turn("Q <multiple_choice>", "two")})
    bad.append({"id": "c", "image": "valid_1_a_1.nii.gz", "conversations": turn("Q", "A")[::-1]})
    file.write_text(json.dumps(bad))
    message = faults("ct-rate-vqa", tmp_path)
    parts = ["question 2: its id is that of", "question 3: its scan's name", "question 4: its options or its answer"]
    for part in [*parts, "question 5: its conversations"]:
        assert part in message


def test_own_questions(tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": "<volume>How many?"}, {"role": "assistant", "content": "12"}],
         "volumes": ["a.nii.gz"], "task": "count"},
        {"messages": [{"role": "user", "content": "<volume><volume>Grown?"}, {"role": "assistant", "content": "B"}],
         "volumes": ["b/x.nii.gz", {"path": "c", "series": 2}], "options": {"A": "yes", "B": "no"}, "id": "own",
         "patient": "p9", "subtask": "s"},
    ]  # fmt: skip
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    one, two = questions.load_benchmark("jsonl", file, volumes=tmp_path)
    assert (one["id"], one["kind"], one["patient"], one["task"]) == ("jsonl/000001", "number", "a", "count")
    assert one["volumes"] == [str(tmp_path / "a.nii.gz")]
    assert (two["kind"], two["choices"], two["patient"], two["subtask"]) == ("choice", ["A", "B"], "p9", "s")
    assert two["volumes"] == [str(tmp_path / "b/x.nii.gz"), {"path": str(tmp_path / "c"), "series": 2}]
    assert missing_volumes([one, two]) == [one["volumes"][0], two["volumes"][0], str(tmp_path / "c")]
    lines[1]["options"] = {"A": "yes"}
    lines += [{**lines[0], "id": "same"}, {**lines[0], "id": "same"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    message = faults("jsonl", file)
    assert "own.jsonl line 2: its answer 'B' is none of the choices A" in message
    assert "own.jsonl line 4: its id is that of own.jsonl line 3" in message
    file.write_text('{"messages": []}\n')
    assert "own.jsonl line 1" in faults("jsonl", file)


def as_set(lines):
    keys = dict.fromkeys(key for line in lines for key in line)  # `from_list` takes those of the first row
    return Dataset.from_list([{key: line.get(key) for key in keys} for line in lines])


def forms(lines, folder):
    """{name: (source, split)}: the same rows in every form that a set of `datasets` has."""
    data = as_set(lines)
    other = data.select([0])
    both = DatasetDict({"train": other, "test": data})
    data.to_parquet(folder / "rows.parquet")
    data.save_to_disk(folder / "saved")
    both.save_to_disk(folder / "dict")
    DatasetDict({"train": other, "fold2": data}).save_to_disk(folder / "folds")
    (folder / "parquet").mkdir()
    data.to_parquet(folder / "parquet" / "part.parquet")
    (folder / "splits").mkdir()
    data.to_parquet(folder / "splits" / "test.parquet")
    other.to_parquet(folder / "splits" / "train.parquet")
    found = {name: (folder / name, None) for name in ("rows.parquet", "saved", "dict", "parquet", "splits")}
    found |= {"in memory": (data, None), "of two": (both, None), "stream": (data.to_iterable_dataset(), None)}
    return found | {"folds": (folder / "folds", "fold2")}


def test_own_questions_come_from_sets_of_datasets(tmp_path, capsys):
    """Arrow gives each row the keys of all rows, empty where it had none."""
    lines = [
        {"messages": [{"role": "user", "content": "<volume>How many?"}, {"role": "assistant", "content": "12"}],
         "volumes": ["a.nii.gz"], "task": "count"},
        {"messages": [{"role": "user", "content": "<volume>Grown?"}, {"role": "assistant", "content": "B"}],
         "volumes": ["b/x.nii.gz"], "options": {"A": "yes", "B": "no"}, "id": "own", "patient": "p9"},
        {"messages": [{"role": "user", "content": "<volume>Which?"}, {"role": "assistant", "content": "A"}],
         "volumes": ["b/x.nii.gz"], "options": {"A": "liver", "B": "lung", "C": "none"}, "subtask": "s"},
    ]  # fmt: skip
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = questions.load_benchmark("jsonl", file, volumes=tmp_path)
    assert [row["choices"] for row in expected] == [None, ["A", "B"], ["A", "B", "C"]]
    (tmp_path / "sets").mkdir()
    for name, (source, split) in forms(lines, tmp_path / "sets").items():
        assert questions.load_benchmark("jsonl", source, volumes=tmp_path, split=split) == expected, name
    train = questions.load_benchmark("jsonl", tmp_path / "sets" / "dict", volumes=tmp_path, split="train")
    assert train == expected[:1]
    message = faults("jsonl", tmp_path / "sets" / "folds", volumes=tmp_path)
    assert "no split 'test'; it has train, fold2" in message and "--split" in message
    lines[1]["options"] = {"A": "yes"}
    message = faults("jsonl", as_set(lines), volumes=tmp_path)
    assert "row 1: its answer 'B' is none of the choices A" in message


@pytest.mark.parametrize("name", ["3d-rad", "deeptumorvqa-1-mc", "deeptumorvqa-2", "m3d-vqa", "ct-rate-vqa", "jsonl"])
def test_every_benchmark_says_what_to_download(name):
    text = questions.what_to_download(name)
    assert "questions: " in text and "scans: " in text
    hub = questions.BENCHMARKS[name].hub
    assert hub is None or hub in text


@pytest.mark.parametrize(
    ("scan", "patient"),
    [
        ("x/valid_12_a_1.nii.gz", "valid_12"), ("train_9_ab_10.nii.gz", "train_9"), ("a/BDMAP_1/ct.nii.gz", "BDMAP_1"),
        ("a/other.nii", "other"), ("dicom_folder", "dicom_folder"), ("ct.nii.gz", "ct"),
    ],
)  # fmt: skip
def test_patients_are_read_from_names(scan, patient):
    assert patient_of(scan) == patient
