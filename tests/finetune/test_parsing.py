"""Config files and flags."""

import pytest

from qft_hf.hf import shipped
from qft_hf.hf.finetune import parse_arguments
from qft_hf.hf.finetune.foreign_keys import OURS
from qft_hf.hf.finetune.parsing import GROUPS

CONFIGS = sorted(shipped.FOLDER.glob("*.yaml"))
REQUIRED = "model_name_or_path: model\ntrain_data: rows.jsonl\nuse_cpu: true\n"


@pytest.fixture
def config(tmp_path):
    """Write a config with the required keys and some more."""

    def write(text=""):
        path = tmp_path / "run.yaml"
        path.write_text(f"{REQUIRED}output_dir: {tmp_path / 'run'}\n{text}")
        return str(path)

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_project_is_valid(path):
    # bf16 is refused where there is no GPU, unless the CPU is asked for.
    arguments = parse_arguments([str(path), "--use_cpu", "true"])

    assert arguments.training.optim == "qft_lion"
    assert arguments.training.output_dir == f"runs/{path.stem}"


def test_there_are_configs():
    assert shipped.config_names() == ["boolq_minilm", "demo", "llama2_7b_vicuna"]
    assert [path.stem for path in CONFIGS] == shipped.config_names()


@pytest.mark.parametrize("name", ["demo", "demo.yaml"])
def test_a_config_that_ships_is_known_by_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_arguments([name, "--use_cpu"]).training.output_dir == "runs/demo"

    (tmp_path / "demo.yaml").write_text(REQUIRED + "output_dir: mine\n")
    wanted = {"demo": "runs/demo", "demo.yaml": "mine"}  # a file that is there comes first
    assert parse_arguments([name, "--use_cpu"]).training.output_dir == wanted[name]


@pytest.mark.parametrize(
    "name", ["../config", "architectures/llama-2-7b/config", "nowhere", "x.yml"]
)
def test_what_is_no_config_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="Give a YAML file, or the name of a config that sh"
    ):
        parse_arguments([name])


def test_values_get_the_type_of_their_field(config):
    arguments = parse_arguments(
        [
            config(
                "learning_rate: 1e-4\n"  # a string to YAML 1.1
                "max_steps: 7\n"
                "packing: true\n"
                "assistant_only_loss: false\n"
                "modules_to_not_convert: [lm_head, model.embed_tokens]\n"
                "lr_scheduler_kwargs: {min_lr: 1e-6, t: [.5, 3], on: true, by: step}\n"
                "eval_fraction: 0.5\n"
                "save_strategy: no\n"  # false to YAML 1.1
            )
        ]
    )

    assert arguments.training.learning_rate == 1e-4
    assert arguments.training.max_steps == 7
    assert arguments.training.modules_to_not_convert == ["lm_head", "model.embed_tokens"]
    assert arguments.training.lr_scheduler_kwargs == {
        "min_lr": 1e-6,
        "t": [0.5, 3],
        "on": True,
        "by": "step",
    }
    assert arguments.training.save_strategy == "no"
    assert arguments.data.packing is True
    assert arguments.data.assistant_only_loss is False
    assert arguments.data.eval_fraction == 0.5
    assert arguments.output.overwrite_output is False


def test_ligers_kernels_are_a_mapping_in_a_config_and_json_in_a_flag(config):
    path = config("use_liger_kernel: true\nliger_kernel_config:\n  rope: false\n")
    training = parse_arguments([path]).training
    assert training.liger_kernel_config == {"rope": False, "fused_linear_cross_entropy": False}
    assert training.chunked_loss
    training = parse_arguments([path, '--liger_kernel_config={"cross_entropy": true}']).training
    assert training.liger_kernel_config["cross_entropy"]
    assert not training.chunked_loss
    with pytest.raises(ValueError, match="chunked_loss=True then takes its place"):
        parse_arguments([path, '--liger_kernel_config={"fused_linear_cross_entropy": true}'])
    for flag in ("--chunked_loss", "--chunked_loss=true"):
        assert parse_arguments([config(), flag]).training.chunked_loss
    assert parse_arguments([config()]).training.chunked_loss is False


def test_int8_products_are_a_mapping_in_a_config_and_json_in_a_flag(config):
    path = config("matmul: int8\nint8_products:\n  lm_head: [forward]\n  down_proj: []\n")

    wanted = {"lm_head": ["forward"], "down_proj": []}
    assert parse_arguments([path]).training.quantization_config.int8_products == wanted
    changed = parse_arguments([path, '--int8_products={"*": ["forward"]}']).training
    assert changed.quantization_config.int8_products == {"*": ["forward"]}
    assert changed.quantization_config.matmul == "int8"


def test_options_of_the_optimizer_are_keys_and_flags(config):
    path = config("gradient: release\nclipping: previous\nbeta2: 0.98\nmomentum_bits: 4\n")

    options = {"gradient": "release", "clipping": "previous", "beta2": 0.98, "momentum_bits": 4}
    assert parse_arguments([path]).training.optimizer_fields == options
    changed = parse_arguments([path, "--clipping=tensor", "--stochastic_rounding=false"]).training
    changes = {"clipping": "tensor", "stochastic_rounding": False}
    assert changed.optimizer_fields == options | changes
    with pytest.raises(ValueError, match="clipping must be None or 'exact' or 'previous'"):
        parse_arguments([path, "--clipping=norm"])


def test_what_was_given_is_known_apart_from_defaults(config):
    path = config("learning_rate: 2e-4\npacking: true\nlr_scheduler_kwargs: {num_cycles: 0.5}\n")
    arguments = parse_arguments([path, "--learning_rate", "1e-4", "--no_assistant_only_loss"])

    given = dict(arguments.given)
    assert given.pop("output_dir").endswith("run")
    assert given == {
        "model_name_or_path": "model",
        "train_data": ["rows.jsonl"],
        "use_cpu": True,
        "learning_rate": 1e-4,
        "packing": True,
        "lr_scheduler_kwargs": '{"num_cycles": 0.5}',
        "assistant_only_loss": False,
    }


def test_flags_override_the_config(config):
    path = config("max_length: 64\npacking: true\nmodules_to_not_convert: [a, b]\n")
    arguments = parse_arguments(
        [path, "--max_length", "32", "--packing=false", "--modules-to-not-convert", "c"]
    )

    assert arguments.data.max_length == 32
    assert arguments.data.packing is False
    assert arguments.training.modules_to_not_convert == ["c"]
    assert arguments.data.train_data == ["rows.jsonl"]


def test_flags_alone_are_enough(tmp_path):
    flags = ["--model_name_or_path=m", "--train_data=t.csv", "--no_assistant_only_loss"]
    arguments = parse_arguments([*flags, f"--output_dir={tmp_path}", "--use_cpu"])

    assert arguments.model.model_name_or_path == "m"
    assert arguments.data.assistant_only_loss is False


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning_rat", "'learning_rate'"),
        ("max_len", "'max_length'"),
        ("outlier_fractions", "'outlier_fraction'"),
    ],
)
def test_unknown_names_suggest_the_nearest(key, nearest, config):
    with pytest.raises(ValueError, match=f"unknown key in .*run.yaml: '{key}'. Did .*{nearest}"):
        parse_arguments([config(f"{key}: 1\n")])
    with pytest.raises(ValueError, match=f"unknown flag: '{key}'. Did you mean .*{nearest}"):
        parse_arguments([config(), f"--{key}", "1"])


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("cutoff_len", "Here it is 'max_length'"),
        ("sequence_len", "Here it is 'max_length'"),
        ("dataset", "Here it is 'train_data'"),
        ("lr", "Here it is 'learning_rate'"),
        ("val_size", "Here it is 'eval_fraction'"),
        ("micro_batch_size", "Here it is 'per_device_train_batch_size'"),
        ("train_on_inputs", "Here it is 'assistant_only_loss', which is its opposite"),
        ("lora_r", "Leave it out: every parameter is trained"),
        ("streaming", "Leave it out: rows are kept on disk"),
    ],
)
def test_keys_of_other_tools_are_translated(key, text, config):
    with pytest.raises(ValueError, match=f"unknown key in .*run.yaml: '{key}'. {text}"):
        parse_arguments([config(f"{key}: 1\n")])


def test_every_translation_leads_to_a_key_that_there_is():
    known = {name for group in GROUPS for name in group.__dataclass_fields__}
    assert {text.split("'")[1] for text in OURS.values()} <= known
    assert not known & set(OURS)


def test_unknown_name_like_no_other(config):
    with pytest.raises(ValueError, match=r"unknown key .*'xyzzy'\. `qft-hf finetune --help-all` l"):
        parse_arguments([config("xyzzy: 1\n")])


@pytest.mark.parametrize("nothing", ["", "null", "~"])
def test_key_without_a_value_is_refused(nothing, config):
    with pytest.raises(ValueError, match=r"'max_length' in .* has no value. Give one, or leave"):
        parse_arguments([config(f"max_length: {nothing}\n")])


def test_config_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="one `key: value` a line, got list"):
        parse_arguments([str(path)])


def test_missing_config_is_named():
    with pytest.raises(
        FileNotFoundError, match=r"no config nowhere\.yaml .*looked from.*Give a YAML"
    ):
        parse_arguments(["nowhere.yaml"])


def test_second_config_is_refused(config):
    with pytest.raises(ValueError, match=r"cannot place 'other\.yaml' .* at most one config"):
        parse_arguments([config(), "other.yaml"])


def test_impossible_value_names_its_flag(config, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([config("task: poetry\n")])
    assert "--task" in (printed := capsys.readouterr().err)
    assert "poetry" in printed


def test_missing_required_name(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--train_data", "rows.jsonl"])
    assert "--model_name_or_path" in capsys.readouterr().err


def test_help_lists_every_group(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--help"], description="What it is for.")

    text = capsys.readouterr().out
    assert ended.value.code == 0
    for part in ("What it is for.", "--train_data", "--outlier_fraction", "--export_dtype"):
        assert part in text


@pytest.mark.parametrize(
    ("optim", "rate"), [("qft_lion", 1e-5), ("qft_adamw", 5e-5), ("adamw_torch", 5e-5)]
)
def test_every_optimizer_has_its_own_rate(optim, rate, config):
    """AdamW's moves a weight by far less than Lion's of the same number."""
    assert parse_arguments([config(f"optim: {optim}\n")]).training.learning_rate == rate
    given = parse_arguments([config(f"optim: {optim}\nlearning_rate: 5e-5\n")])
    assert given.training.learning_rate == 5e-5


def test_sgd_has_no_rate_that_suits_all(config):
    with pytest.raises(ValueError, match=r"'qft_sgd' has no rate of its own\. Set learning_rate"):
        parse_arguments([config("optim: qft_sgd\n")])
