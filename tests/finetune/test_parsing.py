"""Config files and flags."""

import math

import pytest

from qft_hf.hf import shipped
from qft_hf.hf.finetune import parse_arguments
from qft_hf.hf.finetune.foreign_keys import OURS
from qft_hf.hf.finetune.parsing import GROUPS

CONFIGS = sorted(shipped.FOLDER.glob("*.yaml"))
REQUIRED = "model_name_or_path: model\ntrain_data: rows.jsonl\nuse_cpu: true\n"


@pytest.fixture
def config(tmp_path):
    """Return a function that writes a config with the required keys and further text."""

    def write(text=""):
        path = tmp_path / "run.yaml"
        path.write_text(f"{REQUIRED}output_dir: {tmp_path / 'run'}\n{text}")
        return str(path)

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_project_is_valid(path):
    # BF16 is refused without a GPU unless the CPU is requested.
    arguments = parse_arguments([str(path), "--use_cpu", "true"])

    assert arguments.training.optim == "qft_lion"
    assert arguments.training.output_dir == f"runs/{path.stem}"


def test_there_are_configs():
    assert shipped.shipped_names(".yaml") == ["boolq_minilm", "demo", "llama2_7b_vicuna"]
    assert [path.stem for path in CONFIGS] == shipped.shipped_names(".yaml")


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
        FileNotFoundError, match=rf"no config {name} .*looked from.*Give a YAML file, or the name"
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


def test_several_reporters_are_a_list(config):
    """The second one was an error about the command line, although it was in the config."""
    path = config("report_to: [tensorboard, wandb]\n")
    assert parse_arguments([path]).training.report_to == ["tensorboard", "wandb"]
    flags = ["--report_to", "mlflow", "wandb"]
    assert parse_arguments([path, *flags]).training.report_to == ["mlflow", "wandb"]
    for none in ("", "report_to: none\n", "report_to: [none]\n"):
        assert parse_arguments([config(none)]).training.report_to == []


def test_a_list_for_a_key_that_takes_one_value_is_refused(config):
    with pytest.raises(ValueError, match=r"'optim_target_modules' .* takes one value, got \['q"):
        parse_arguments([config("optim_target_modules: [q_proj, v_proj]\n")])


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


def test_what_a_launcher_has_set_is_given(config, monkeypatch):
    """A run of `accelerate launch --mixed_precision bf16` left it out of its run.yaml, which then
    repeated it in FP32."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    path = config()

    arguments = parse_arguments([path])

    assert arguments.training.bf16
    assert arguments.given["bf16"] is True
    assert arguments.given["torch_compile_backend"] == "aot_eager"
    assert arguments.training.torch_compile
    assert "torch_compile_mode" not in arguments.given
    with pytest.raises(ValueError, match=r"bf16 is false, .* Leave bf16 out, or launch with"):
        parse_arguments([path, "--bf16=false"])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert not {"bf16", "torch_compile_backend"} & parse_arguments([path]).given.keys()


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
        ("cutoff_len", "Here it is called 'max_length'"),
        ("sequence_len", "Here it is called 'max_length'"),
        ("dataset", "Here it is called 'train_data'"),
        ("lr", "Here it is called 'learning_rate'"),
        ("val_size", "Here it is called 'eval_fraction'"),
        ("micro_batch_size", "Here it is called 'per_device_train_batch_size'"),
        ("train_on_inputs", "Here it is called 'assistant_only_loss', which is its opposite"),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: [1e-5, 2e-5]", r"'learning_rate' in .* takes one value, got \['1e-5'"),
        ("modules_to_not_convert: []", "'modules_to_not_convert' in .* takes names or numbers"),
        ("eval_data: [a, null]", r"'eval_data' in .* got \['a', 'null'\]"),
        ("eval_data: [a, ~]", r"'eval_data' in .* got \['a', '~'\]"),  # all files of one's home
        ("eval_data: [{path: a}]", r"'eval_data' in .* got \[{'path': 'a'}\]"),
        ("eval_data: [[a]]", r"'eval_data' in .* got \[\['a'\]\]"),
    ],
)
def test_a_list_is_of_names_and_where_one_is_wanted(text, message, config):
    with pytest.raises(ValueError, match=message):
        parse_arguments([config(f"{text}\n")])


@pytest.mark.parametrize(
    ("key", "value", "fine"),
    [
        ("dataloader_drop_last", "true", "false"),
        ("prediction_loss_only", "true", "false"),
        ("eval_do_concat_batches", "false", "true"),
        ("batch_eval_metrics", "true", "false"),
        ("bf16_full_eval", "true", "false"),
    ],
)
def test_what_would_falsify_the_scores_is_refused(key, value, fine, config):
    """These options once left out evaluation rows, cast floats to BF16, or dropped a key."""
    with pytest.raises(ValueError, match=rf"{key} cannot be set: .* Leave it out\."):
        parse_arguments([config(f"{key}: {value}\n")])
    parse_arguments([config(f"{key}: {fine}\n")])


def test_config_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="one `key: value` per line, got list"):
        parse_arguments([str(path)])


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
        parse_arguments(["--help"])

    text = capsys.readouterr().out
    assert ended.value.code == 0
    for part in ("Train every parameter", "--train_data", "--outlier_fraction", "--export_dtype"):
        assert part in text


@pytest.mark.parametrize(
    ("optim", "rate"), [("qft_lion", 1e-5), ("qft_adamw", 5e-5), ("adamw_torch", 5e-5)]
)
def test_every_optimizer_has_its_own_rate(optim, rate, config):
    """AdamW moves a weight by far less than Lion at the same rate."""
    assert parse_arguments([config(f"optim: {optim}\n")]).training.learning_rate == rate
    given = parse_arguments([config(f"optim: {optim}\nlearning_rate: 5e-5\n")])
    assert given.training.learning_rate == 5e-5


def test_sgd_has_no_rate_that_suits_all(config):
    with pytest.raises(ValueError, match=r"'qft_sgd' has no default rate\. Set learning_rate"):
        parse_arguments([config("optim: qft_sgd\n")])


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("learning_rate: 1e-4\nseed: 3\nlearning_rate: 1e-3\n", "'learning_rate' .* line 7"),
        ("lr_scheduler_kwargs:\n  min_lr: 1\n  min_lr: 2\n", "'min_lr' occurs more than"),
        ("seed:\t3\n", "line 5"),
        ("seed:3\n", "line 5"),
        ("run_name: {{ name }}\n", "a key is not a name.*line 5"),
        ("[seed, data_seed]: 3\n", "a key is not a name.*line 5"),
    ],
)
def test_what_is_no_yaml_is_refused_with_its_line(config, text, what):
    """Once, the last of two equal keys counted, and a tab or a placeholder ended in a traceback."""
    with pytest.raises(ValueError, match=rf"(?s){what}.*no tabs"):
        parse_arguments([config(text)])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_config_may_have_the_encodings_of_editors(config, encoding):
    path = config("seed: 3\nchat_template: Grüße.jinja\r\n")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    with open(path, "w", encoding=encoding) as file:
        file.write(text)

    arguments = parse_arguments([path])

    assert (arguments.training.seed, arguments.model.chat_template) == (3, "Grüße.jinja")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_steps", "0"),
        ("max_steps", "-5"),
        ("num_train_epochs", "-0.5"),
        ("per_device_train_batch_size", "0"),
        ("gradient_accumulation_steps", "0"),
        ("max_train_rows", "-3"),
        ("save_steps", "0"),
        ("save_total_limit", "0"),
        ("preprocessing_workers", "-1"),
        ("eval_accumulation_steps", "0"),
    ],
)
def test_none_or_less_of_what_is_counted_is_refused(config, key, value):
    """Some values once caused a division by zero, and `max_steps: 0` trained for three epochs."""
    with pytest.raises(ValueError, match=f"{key} must be above 0, got {value}. Leave it out"):
        parse_arguments([config(f"{key}: {value}\n")])


def test_counts_may_be_small_and_shares(config):
    text = "max_steps: -1\nnum_train_epochs: 0.5\nsave_steps: 0.1\nmax_train_rows: 1\nseed: 0\n"
    training = parse_arguments([config(text)]).training
    assert (training.max_steps, training.num_train_epochs, training.save_steps) == (-1, 0.5, 0.1)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("save_steps", "inf", "save_steps must be a finite number, got inf"),
        ("warmup_steps", "nan", "warmup_steps must be a finite number, got nan"),
        ("num_train_epochs", "inf", "num_train_epochs must be a finite number"),
        ("max_grad_norm", "nan", "max_grad_norm must be a finite number"),
        ("dataloader_num_workers", "-1", "dataloader_num_workers must be 0 or more, got -1"),
        ("label_smoothing_factor", "-0.1", r"in \[0, 1\), got -0\.1\. Leave it out"),
        ("label_smoothing_factor", "1", r"in \[0, 1\), got 1\."),
        ("lr_scheduler_kwargs", "abc", "takes a mapping of names to values, got 'abc'. Write it"),
        ("accelerator_config", "[1, 2]", "takes one value"),
        ("accelerator_config", "nowhere.json", "of names to values, got 'nowhere.json'"),
        ("accelerator_config", "'{broken'", "takes a mapping of names to values, got '{broken'"),
        ("accelerator_config", "{nosuch: true}", "unexpected keyword argument 'nosuch'"),
    ],
)
def test_numbers_that_are_none_and_words_for_mappings_are_refused(config, key, value, text):
    """Some values once ended in a traceback, even after loading; a smoothing below 0 was used."""
    with pytest.raises(ValueError, match=text):
        parse_arguments([config(f"{key}: {value}\n")])


def test_norms_may_be_measured_and_nothing_clipped(config):
    assert parse_arguments([config("max_grad_norm: inf\n")]).training.max_grad_norm == math.inf


@pytest.mark.parametrize(("key", "value"), [("seed", "-1"), ("seed", str(2**32))])
def test_a_seed_is_one_that_all_generators_take(config, key, value):
    with pytest.raises(ValueError, match=rf"seed must be in \[0, 2\*\*32\), got {value}"):
        parse_arguments([config(f"{key}: {value}\n")])


@pytest.mark.parametrize("share", ["5", "1", "0", "-0.1"])
def test_a_share_of_the_rows_is_between_none_and_all(config, share):
    with pytest.raises(ValueError, match=r"For 5 % write 0\.05"):
        parse_arguments([config(f"eval_fraction: {share}\n")])


def test_what_the_trainer_refuses_reads_as_what_we_refuse(config):
    """The command shows errors of qft_hf as text, and a traceback for all others."""
    with pytest.raises(ValueError, match="warmup_steps") as refused:
        parse_arguments([config("warmup_steps: -1\n")])
    assert refused.traceback[-1].path.name == "parsing.py"
    with pytest.raises(ValueError, match="deepspeed"):  # which is not installed
        parse_arguments([config("deepspeed: ds.json\n")])


@pytest.mark.parametrize("key", ["model_name_or_path", "chat_template", "train_data", "output_dir"])
def test_paths_are_read_as_a_shell_reads_them(key, tmp_path, monkeypatch):
    """`output_dir: ${DISK}/runs` once made a folder `${DISK}`, and `~` was a name on the Hub."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DISK", "/disk")
    values = {"model_name_or_path": "m", "train_data": "t.jsonl", "output_dir": "out"}

    def read(path):
        flags = [f"--{name}={value}" for name, value in (values | {key: path}).items()]
        arguments = parse_arguments([*flags, "--use_cpu"])
        holders = vars(arguments.model) | vars(arguments.data) | vars(arguments.training)
        found = holders[key]
        return found[0] if isinstance(found, list) else found

    assert read("~/a") == str(tmp_path / "a")
    assert read("${DISK}/a") == read("$DISK/a") == "/disk/a"
    with pytest.raises(ValueError, match=r"variable \$NONE, which is not set. Set it, or write"):
        read("$NONE/a")
    (tmp_path / "$NONE").write_text("there")  # a path is a path
    assert read(str(tmp_path / "$NONE")) == str(tmp_path / "$NONE")


def test_a_pattern_begins_at_home_too(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    arguments = parse_arguments(
        ["--model_name_or_path=m", "--train_data=glob:~/*.jsonl", "--output_dir=o", "--use_cpu"]
    )
    assert arguments.data.train_data == ["glob:/home/me/*.jsonl"]


@pytest.mark.parametrize(
    ("key", "flag"),
    [("eval_fraction: 0.5", "--eval_data=t.jsonl"), ("eval_data: t.jsonl", "--eval_fraction=0.5")],
)
def test_a_flag_replaces_what_a_config_says_in_another_way(config, key, flag):
    """`qft-hf evaluate RUN --eval_data FILE` was once refused if the run had held out a share."""
    data = parse_arguments([config(f"{key}\n"), flag]).data
    assert (data.eval_data is None) == flag.startswith("--eval_fraction")
    assert (data.eval_fraction is None) == flag.startswith("--eval_data")

    other = f"{key}\n{flag.removeprefix('--').replace('=', ': ')}\n"
    with pytest.raises(ValueError, match=r"both say what is held out\. Set one"):
        parse_arguments([config(other)])


def test_other_held_out_data_have_their_own_split_and_no_limit(config):
    """`qft-hf evaluate RUN --eval_data FILE` once scored as many rows as the run had held out."""
    place = config("eval_data: a\neval_split: validation\neval_config: b\nmax_eval_rows: 3\n")
    data = parse_arguments([place, "--eval_data=t.jsonl"]).data
    assert (data.eval_split, data.eval_config, data.max_eval_rows) == ("train", None, None)

    data = parse_arguments([place, "--eval_data", "c", "--max-eval-rows=2", "--eval_config=d"]).data
    assert (data.eval_split, data.eval_config, data.max_eval_rows) == ("train", "d", 2)

    data = parse_arguments([place, "--eval_split=test"]).data
    assert (data.eval_split, data.eval_config, data.max_eval_rows) == ("test", "b", 3)


@pytest.mark.parametrize("flags", [["--seed=1", "my.yaml"], ["--use_cpu", "true", "a/b.yml"]])
def test_a_config_behind_the_flags_is_named(flags):
    """The error once said that its keys were missing."""
    with pytest.raises(ValueError, match=f"the config must come first, then flags: {flags[-1]} --"):
        parse_arguments(flags)


@pytest.mark.parametrize("key", ["output_dir", "train_data", "model_name_or_path"])
def test_an_empty_path_is_no_folder(key, config):
    """`--output_dir "$OUT"` with an empty variable once wrote into the current folder."""
    with pytest.raises(ValueError, match=r"a path is empty\. Is it a variable"):
        parse_arguments([config(), f"--{key}="])
