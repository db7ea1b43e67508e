"""Deliberate faults, and whether the tests notice them: mutation testing, with mutants that would hurt somebody.

    python -m tests.mutations                  all of them, a second or two each
    python -m tests.mutations NAME [NAME ...]  some

Each fault is a small edit of one file and breaks one promise. It is made in a copy of the working tree, where the one
test that must catch it is run: `caught` if that fails, `MISSED` if it passes. First of all, every test must pass in the
copy as it is. The exit status is 1 if a fault is missed, or does not fit the code any more.

A test cannot show that it is able to fail. This does, for the promises that matter most.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from training.base.console import UserError, run_main, say

ROOT = Path(__file__).resolve().parents[1]

OWN_PACKAGES = ("data_prep", "launch", "tests", "training")

TESTS_FAILED = 1  # pytest's exit status; others say that it could not collect, or did not understand its command line


@dataclass(frozen=True)
class Fault:
    """In `file`, `old` (which occurs once) becomes `new`, and `test` must fail; paths from the repository's root."""

    name: str
    file: str
    old: str
    new: str
    test: str


FAULTS = (
    # Runs with a budget.
    Fault(
        "what another run chose is taken for one's own",
        "training/engine/budget.py",
        "if differing <= set(open_keys) else",
        "if differing >= set() else",
        "tests/training/engine/test_budget.py::test_a_run_that_was_begun_keeps_its_choice_before_its_first_checkpoint_"
        "unless_it_is_another_run",
    ),
    Fault(
        "a later start chooses again",
        "training/engine/budget.py",
        "if values:",
        "if not values and known:",
        "tests/training/engine/test_budget.py::test_run_with_a_budget_is_bit_for_bit_that_with_its_choices_written_out_"
        "and_keeps_them_when_killed",
    ),
    # Runs that live at an address.
    Fault(
        "a machine that slept believes its link",
        "training/engine/address/claim.py",
        "if versions[-1:] != [link.version]:",
        "if not versions:",
        "tests/training/engine/test_address.py::test_two_machines_never_both_publish_in_whatever_order_they_act[drive-100]",
    ),
    Fault(
        "a name is given twice",
        "training/engine/address/store.py",
        'file = target.open("xb")',
        'file = target.open("wb")',
        "tests/training/engine/test_address.py::test_two_machines_never_both_publish_in_whatever_order_they_act[drive-100]",
    ),
    Fault(
        "a checkpoint is published before all of it has arrived",
        "training/engine/address/home.py",
        "if self._store.names(place) != sizes:",
        "if not self._store.names(place):",
        "tests/training/engine/test_address.py::test_a_checkpoint_is_published_only_once_all_of_it_has_arrived[drive]",
    ),
    # What is learned.
    Fault(
        "GPT sees the future",
        "training/models/gpt.py",
        "return F.scaled_dot_product_attention(query, key, value, is_causal=True)",
        "return F.scaled_dot_product_attention(query, key, value)",
        "tests/training/test_gpt.py::test_later_tokens_change_nothing_earlier[rotary-layer]",
    ),
    Fault(
        "GPT does not learn to end",
        "training/gpt.py",
        "inside = position < torch.from_numpy(self.lengths[samples])[:, None]",
        "inside = position < torch.from_numpy(self.lengths[samples] - 1)[:, None]",
        "tests/training/test_gpt.py::test_batch_holds_source_separator_target_and_labels_one_further[joint-all-False]",
    ),
    Fault(
        "a step takes micro-batches of any length",
        "training/engine/batch_plan.py",
        "np.array_split(np.arange(count), in_step)",
        "np.array_split(random.permutation(count), in_step)",
        "tests/training/engine/test_batch_plan.py::test_every_step_takes_a_micro_batch_of_each_class_of_length[4]",
    ),
    Fault(
        "Muon takes query, key and value for one matrix",
        "training/engine/muon.py",
        'getattr(module, "stacked", 1)',
        "1",
        "tests/training/engine/test_muon.py::test_block_matrices_are_muons_query_key_and_value_apart_and_all_else_is_adamws",
    ),
    Fault(
        "ranks keep what another has computed to themselves",
        "training/engine/cluster.py",
        "dist.broadcast(result, place % self.world_size)",
        "pass",
        "tests/training/engine/test_muon.py::test_three_ranks_share_the_work_and_no_bit_depends_on_who_did_it",
    ),
    Fault(
        "seq2seq attends to padding",
        "training/models/attention_gru.py",
        "scores = scores.masked_fill(padding, -torch.inf)",
        "scores = scores.masked_fill(padding, 0.0)",
        "tests/training/models/test_attention_gru.py::test_a_sentence_gets_the_same_logits_alone_and_beside_longer_ones[{}]",
    ),
    Fault(
        "seq2seq learns padding",
        "training/seq2seq.py",
        "np.arange(labels.shape[1]) < target_lengths[:, None]",
        "np.arange(labels.shape[1]) < labels.shape[1] + 0 * target_lengths[:, None]",
        "tests/training/models/test_attention_gru.py::test_loss_is_over_real_target_tokens_only",
    ),
    Fault(
        "validation with dropout",
        "training/translation.py",
        "    model.eval()\n    batches",
        "    model.train()\n    batches",
        "tests/training/models/test_attention_gru.py"
        "::test_validation_is_the_mean_over_real_target_tokens_without_dropout_whatever_the_batches",
    ),
    Fault(
        "validation averages over padding",
        "training/translation.py",
        "/ int(pairs.target_tokens.sum())",
        "/ int(pairs.target_tokens.max() * len(pairs.target_tokens))",
        "tests/training/models/test_attention_gru.py"
        "::test_validation_is_the_mean_over_real_target_tokens_without_dropout_whatever_the_batches",
    ),
    Fault(
        "label smoothing leaves out the label",
        "training/models/cross_entropy.py",
        "gradient -= ctx.smoothing / gradient.shape[1]",
        "gradient -= ctx.smoothing / (gradient.shape[1] - 1)",
        "tests/training/models/test_model_parts.py::test_losses_and_gradients_are_those_of_torch[0.1]",
    ),
    Fault(
        "QLoRA learns the question",
        "training/qlora.py",
        "np.add.at(ends, (row, learned.values[::2] - 1), 1)",
        "np.add.at(ends, (row, 0 * learned.values[::2]), 1)",
        "tests/training/test_qlora.py::test_only_the_answer_and_its_end_are_learned_each_from_what_stands_before_it",
    ),
    Fault(
        "QLoRA answers without their end",
        "training/data/chat.py",
        "np.array([*prompt_ids, *answer_ids, self.end_id], dtype=np.int32)",
        "np.array([*prompt_ids, *answer_ids, self.pad_id], dtype=np.int32)",
        "tests/data_prep/test_disc_law.py::test_supervised_tokens_are_the_answer_and_its_end_for_every_task",
    ),
    Fault(
        "padding token is the end token",
        "training/data/chat.py",
        "if candidate is not None and candidate != self.end_id:",
        "if candidate is not None:",
        "tests/data_prep/test_disc_law.py::test_padding_is_never_the_end_token",
    ),
    Fault(
        "adapters in fp16",
        "training/models/adapted_model.py",
        "return peft.get_peft_model(base, lora_config(options))",
        "return peft.get_peft_model(base, lora_config(options), autocast_adapter_dtype=False)",
        "tests/training/test_qlora.py::test_adapters_are_in_fp32_whatever_the_base_model_is_in",
    ),
    Fault(
        "capped logits have the gradient of others",
        "training/models/adapted_model.py",
        "                    shares.mul_(slopes)\n",
        "",
        "tests/training/test_families.py::"
        "test_losses_and_gradients_of_a_padded_batch_are_those_of_the_stock_forward[gemma2]",
    ),
    Fault(
        "the scale of a family's logits is left out",
        "training/models/adapted_model.py",
        '        scale /= getattr(text, "logits_scaling", None) or 1.0  # Granite\n',
        "",
        "tests/training/test_families.py::"
        "test_losses_and_gradients_of_a_padded_batch_are_those_of_the_stock_forward[granite]",
    ),
    Fault(
        "experts are left in 16 bits in silence",
        "training/models/base_model.py",
        "        parameter.ndim > 2\n",
        "        parameter.ndim > 3\n",
        "tests/training/test_families.py::test_mixture_of_experts_is_refused",
    ),
    Fault(
        "a base model is loaded whole before it is spread",
        "training/models/base_model.py",
        "            take(weight)\n",
        "            pass\n",
        "tests/training/test_qlora_zero.py::"
        "test_estimate_is_what_a_real_step_of_two_ranks_takes_and_a_base_in_4_bits_is_spread[names0]",
    ),
    # The data.
    Fault(
        "grouped split looks at one side only",
        "data_prep/splits.py",
        "for side in sides]",
        "for side in sides[:1]]",
        "tests/data_prep/test_splits.py::test_groups_join_rows_through_other_rows",
    ),
    Fault(
        "training rows are validated on",
        "data_prep/splits.py",
        "return Split(order[test + validation :], ",
        "return Split(order[test:], ",
        "tests/data_prep/test_splits.py::test_random_split_of_any_size_is_scikit_learns[1234-100-0.1]",
    ),
    Fault(
        "training pairs that stand in test are counted and kept",
        "data_prep/pairs.py",
        "rows = rows[~stands_in(",
        "rows, _ = rows, rows[~stands_in(",
        "tests/data_prep/test_pairs.py::test_leakage_of_a_given_split_is_said_and_dropped_on_request",
    ),
    Fault(
        "every language is scored as English",
        "training/data/translation_metrics.py",
        "return BLEU(tokenize=language.bleu)",
        "return BLEU()",
        "tests/training/evaluation/test_languages.py::test_scores_are_of_the_target_language_and_the_report_calls_both_by_name",
    ),
    Fault(
        "every epoch in the same order",
        "training/engine/batch_plan.py",
        "np.random.SeedSequence([self.seed, epoch])",
        "np.random.SeedSequence([self.seed])",
        "tests/training/engine/test_batch_plan.py::test_epochs_and_seeds_differ_in_order_and_in_composition",
    ),
    Fault(
        "a mixture has the same half in every epoch",
        "training/engine/batch_plan.py",
        "(self.phase + epoch * self.count) % len(self.samples)",
        "self.phase % len(self.samples)",
        "tests/training/engine/test_batch_plan.py::test_every_epoch_of_a_mixture_has_each_source_by_its_weight_in_as_many_"
        "micro_batches",
    ),
    Fault(
        "answers share a pass though the template shows them otherwise",
        "data_prep/conversation_rows.py",
        "np.array_equal(later[: len(sooner)], sooner)",
        "len(later) > len(sooner)",
        "tests/data_prep/test_learn_all.py::test_where_an_earlier_turn_is_shown_otherwise_each_answer_is_a_sample_of_its_"
        "own",
    ),
    Fault(
        "held-out answers are scored though their prompt is trained on",
        "data_prep/conversation_rows.py",
        "if prompt not in trained)",
        "if prompt or trained)",
        "tests/data_prep/test_learn_all.py::test_a_held_out_turn_whose_prompt_is_trained_on_is_read_and_not_scored",
    ),
    Fault(
        "the plan remembers",
        "training/engine/batch_plan.py",
        "self._stratified(epoch, random)",
        "self._stratified(epoch, random)[:: 1 - 2 * len(self._epochs)]",
        "tests/training/engine/test_batch_plan.py::test_steps_asked_in_any_order_or_of_a_fresh_plan_are_the_same",
    ),
    Fault(
        "ranks share overlapping micro-batches",
        "training/engine/batch_plan.py",
        "return self.step(step)[rank::world_size]",
        "return self.step(step)[: self.micro_batches_per_step // world_size]",
        "tests/training/engine/test_batch_plan.py::test_shares_of_all_ranks_add_up_to_the_same_micro_batches[2]",
    ),
    # A step.
    Fault(
        "mean of means",
        "training/engine/loop.py",
        "loss = task.loss(engine.replica, batch.samples) / weight",
        "loss = task.loss(engine.replica, batch.samples) / (len(batches) * len(batch.samples))",
        "tests/training/engine/test_loop.py::test_gradient_of_a_step_is_that_of_the_mean_over_all_its_tokens",
    ),
    Fault(
        "dropout depends on the rank",
        "training/engine/loop.py",
        "seed_dropout(config.seed, step, batch.number, cluster.device)",
        "seed_dropout(config.seed, step, cluster.rank, cluster.device)",
        "tests/training/engine/test_loop.py::test_micro_batches_and_their_dropout_do_not_depend_on_the_rank_that_runs_them[2]",
    ),
    Fault(
        "clipping before unscaling",
        "training/engine/parallel.py",
        "self._scaler.unscale_(self.optimizer)",
        "self._scaler.get_scale()",
        "tests/training/engine/test_loop.py::test_gradient_is_clipped_as_it_is_and_not_as_it_was_scaled",
    ),
    Fault(
        "gradients that are not finite are applied",
        "training/engine/parallel.py",
        "self.optimizer.found_inf = bad",
        "self.optimizer.found_inf = torch.zeros_like(bad)",
        "tests/training/engine/test_loop.py::test_gradient_that_is_not_finite_is_skipped_and_counted",
    ),
    Fault(
        "skips of the gradient scaler count as failures",
        "training/engine/parallel.py",
        "torch.zeros_like(bad) if scaler_skip else (self.skipped_in_a_row + 1) * bad",
        "(self.skipped_in_a_row + 1) * bad",
        "tests/training/engine/test_loop.py::test_steps_that_the_scaler_skips_in_search_of_its_range_are_not_counted",
    ),
    Fault(
        "DDP regroups its buckets",
        "training/engine/parallel.py",
        "find_unused_parameters=fixed_buckets",
        "find_unused_parameters=False",
        "tests/training/engine/test_loop.py::test_four_ranks_add_gradients_up_in_the_same_order_in_a_processs_first_step_as_later",
    ),
    Fault(
        "gradient divided by the number of ranks",
        "training/engine/parallel.py",
        "self._backward(loss * self._cluster.world_size)",
        "self._backward(loss)",
        "tests/training/engine/test_loop.py::test_four_ranks_add_gradients_up_in_the_same_order_in_a_processs_first_step_as_later",
    ),
    Fault(
        "bf16 where it is emulated",
        "training/engine/precision.py",
        '"""Whether it computes in bf16, not only emulates it."""\n        return self.capability >= (8, 0)',
        '"""Whether it computes in bf16, not only emulates it."""\n        return self.capability >= (7, 0)',
        "tests/training/test_t4.py::test_bf16_is_refused_where_it_is_emulated",
    ),
    # What a checkpoint holds, and what comes back of it.
    Fault(
        "optimizer begins anew",
        "training/engine/checkpoint.py",
        'optimizer.load_state_dict({"state": state, ',
        'optimizer.load_state_dict({"state": {}, ',
        "tests/training/engine/test_checkpoint.py::test_restored_model_and_optimizer_are_bit_equal_and_train_on_alike",
    ),
    Fault(
        "gradient scaler is not saved",
        "training/engine/parallel.py",
        '{"scaler": self._scaler.state_dict() if self._scaler is not None else None}',
        '{"scaler": None}',
        "tests/training/engine/test_loop.py::test_stopped_run_ends_with_every_bit_of_the_uninterrupted_one[fp16]",
    ),
    Fault(
        "moving average begins anew",
        "training/engine/parallel.py",
        "self._ema.n_averaged.fill_(checkpoint.step)",
        "self._ema.n_averaged.fill_(0)",
        "tests/training/engine/test_loop.py::test_stopped_run_ends_with_every_bit_of_the_uninterrupted_one[fp32]",
    ),
    Fault(
        "stop without a checkpoint",
        "training/engine/loop.py",
        "if self.saved_step != self.step:\n                self._save(due=False)",
        "if self.saved_step is None:\n                self._save(due=False)",
        "tests/training/engine/test_loop.py::test_stopped_run_ends_with_every_bit_of_the_uninterrupted_one[fp32]",
    ),
    Fault(
        "checkpoint changes while it is written",
        "training/engine/saver.py",
        "self._buffers[name][key].copy_(tensor, non_blocking=True)",
        "self._buffers[name][key] = tensor.contiguous()",
        "tests/training/engine/test_saver.py::test_what_is_saved_is_the_state_of_the_step_whatever_training_does_meanwhile[True]",
    ),
    # A checkpoint is published or it does not exist.
    Fault(
        "published before its manifest",
        "training/engine/checkpoint.py",
        "write_atomically(folder / MANIFEST, _manifest_text(written))\n"
        "        publish_folder(folder, final, replace=True)",
        "publish_folder(folder, final, replace=True)\n"
        "        write_atomically(final / MANIFEST, _manifest_text(written))",
        "tests/training/engine/test_checkpoint.py::test_a_checkpoint_is_complete_and_on_the_disk_before_it_is_published",
    ),
    Fault(
        "published before its tensors are on the disk",
        "training/base/files.py",
        "_fsync_file(Path(folder, name))",
        "Path(folder, name).stat()",
        "tests/training/engine/test_checkpoint.py::test_a_checkpoint_is_complete_and_on_the_disk_before_it_is_published",
    ),
    Fault(
        "name of what was published is not on the disk",
        "training/base/files.py",
        "    fsync_folder(final.parent)\n    remove(aside)",
        "    remove(aside)",
        "tests/training/engine/test_checkpoint.py::test_a_checkpoint_is_complete_and_on_the_disk_before_it_is_published",
    ),
    Fault(
        "file has its name before it is on the disk",
        "training/base/files.py",
        "            os.fsync(file.fileno())\n        partial.replace(path)",
        "        partial.replace(path)",
        "tests/training/data/test_prepared.py"
        "::test_file_or_folder_is_on_the_disk_before_it_has_its_name_and_the_name_behind_it",
    ),
    Fault(
        "content of a checkpoint is not verified",
        "training/engine/checkpoint.py",
        'if hashlib.file_digest(file, "sha256").hexdigest() != about["sha256"]:',
        'if not about["sha256"]:',
        "tests/training/engine/test_checkpoint.py::test_single_flipped_bit_is_noticed_and_the_previous_checkpoint_taken[state.json]",
    ),
    Fault(
        "the best checkpoint is removed",
        "training/engine/checkpoint.py",
        "[-keep:] + _best(found, keep_best, best_by)",
        "[-keep:]",
        "tests/training/engine/test_checkpoint.py::test_the_newest_and_the_best_are_kept[10-1]",
    ),
    Fault(
        "another score than the one that is named says which is best",
        "training/engine/checkpoint.py",
        '.get("scores", {}).get(by)',
        '.get("scores", {}).get("accuracy")',
        "tests/training/engine/test_checkpoint.py::test_the_score_that_is_named_says_which_is_best[loss-kept1]",
    ),
    Fault(
        "what is to be kept for good is removed",
        "training/engine/checkpoint.py",
        "if for_good is not None and checkpoint.step not in for_good:",
        "if for_good is not None:",
        "tests/training/engine/test_checkpoint.py::test_a_step_that_is_to_be_kept_for_good_stays",
    ),
    Fault(
        "a picture in an evaluation is any text",
        "training/report/sheets.py",
        'StringConstraints(pattern="^[A-Za-z0-9+/=]*$")',
        "StringConstraints()",
        "tests/training/report/test_pages.py"
        "::test_evaluation_stays_on_the_page_and_what_is_odd_in_it_costs_no_more_than_itself",
    ),
    Fault(
        "the index of runs takes the place of another page",
        "training/report/overview.py",
        "if (is_new and not at_once) or is_anothers(path):",
        "if is_new and not at_once:",
        "tests/training/report/test_pages.py::test_index_has_what_is_a_summary_and_leaves_other_peoples_pages_alone",
    ),
    Fault(
        "answers are scored in another order than they were asked",
        "training/engine/generating.py",
        "return [by_place[place] for place in range(len(samples))]",
        "return list(by_place.values())",
        "tests/training/test_generating.py::test_scores_are_those_of_an_evaluation",
    ),
    Fault(
        "older checkpoints are removed unread",
        "training/engine/checkpoint.py",
        "problem = newest.verify()",
        "problem = None",
        "tests/training/engine/test_checkpoint.py::test_nothing_is_removed_before_the_new_checkpoint_was_read_back_whole",
    ),
    # A run and its sessions.
    Fault(
        "changed config is not refused",
        "training/engine/run_folder.py",
        "            if latest is not None:\n                _check_same_run(latest, about, may_change)",
        "            if latest is not None:\n                Checkpoint(latest.folder)",
        "tests/training/engine/test_loop.py::test_run_with_another_definition_is_refused_and_what_may_change_is_not",
    ),
    Fault(
        "two runs in one folder",
        "training/base/files.py",
        "fcntl.LOCK_EX | ",
        "fcntl.LOCK_SH | ",
        "tests/training/engine/test_loop.py::test_run_folder_is_held_by_one_run_at_a_time",
    ),
    Fault(
        "wsd falls from the warm-up on",
        "training/engine/optim.py",
        'options.schedule == "wsd" and step < course.fork',
        'options.schedule == "wsd" and step < options.warmup_steps',
        "tests/training/engine/test_length.py::"
        "test_rate_of_wsd_is_that_of_a_longer_run_until_it_falls_with_the_square_root",
    ),
    Fault(
        "what stood at the fork is displaced",
        "training/engine/checkpoint.py",
        "kept = to_keep(found) + to_keep([each for each in found if each.step <= newest.fork])",
        "kept = to_keep(found)",
        "tests/training/engine/test_length.py::test_what_stood_where_the_decay_began_stays_until_the_end",
    ),
    Fault(
        "metrics keep what is done again",
        "training/engine/metrics.py",
        "self.lines = lines_up_to(found, resumed_step, validated_step)",
        "self.lines = found",
        "tests/training/engine/test_loop.py::test_record_is_cut_back_to_the_step_that_a_run_falls_back_to",
    ),
    Fault(
        "metrics on the disk after their checkpoint",
        "training/engine/saver.py",
        "            first()\n            self._publish(step, buffers, state, began)",
        "            self._publish(step, buffers, state, began)\n            first()",
        "tests/training/engine/test_saver.py::test_what_comes_first_is_done_before_the_checkpoint_stands",
    ),
    Fault(
        "each rank stops by itself",
        "training/engine/stopping.py",
        "asked, slowest_s = self._cluster.maximum([self._own_reason(now), step_s])",
        "asked, slowest_s = self._own_reason(now), self._cluster.maximum([step_s])[0]",
        "tests/training/engine/test_loop.py::test_all_ranks_stop_at_the_same_step_though_one_alone_has_a_reason",
    ),
    Fault(
        "no margin before the time limit",
        "training/engine/stopping.py",
        "self.reserve_s() + self._options.margin > self._deadline",
        "self.reserve_s() > self._deadline",
        "tests/training/engine/test_loop.py::test_session_ends_while_a_save_and_a_margin_still_fit_into_its_time[25-0-True]",
    ),
    Fault(
        "wandb gets steps that go back",
        "training/engine/wandb/visit.py",
        "at = max(step, self._next)",
        "at = step",
        "tests/training/engine/test_wandb.py::test_step_that_wandb_has_is_not_logged_again_and_none_is_put_before_the_last",
    ),
    Fault(
        "launch.run starts a run that gets nowhere again and again",
        "launch/supervisor.py",
        "fruitless = fruitless + 1 if step <= before else 0",
        "fruitless = 0",
        "tests/launch/test_run.py::test_after_three_sessions_in_a_row_without_progress_it_ends_and_pauses_grow",
    ),
    Fault(
        "an error that the user has to mend is tried again",
        "launch/supervisor.py",
        "if to_mend is not None:",
        "if to_mend is None and not ended:",
        "tests/launch/test_run.py::test_error_that_the_user_can_mend_is_tried_once",
    ),
    Fault(
        "Ctrl-C while the ranks still load ends in their tracebacks",
        "launch/supervisor.py",
        "number if handles(rank.pid, signal.SIGTERM) else signal.SIGTERM",
        "number",
        "tests/launch/test_run.py::test_signal_before_a_rank_handles_any_ends_it_in_silence[2]",
    ),
    Fault(
        "a notice for another machine stops the run",
        "training/engine/notices.py",
        'event["EventType"] in _AZURES and name in event["Resources"]',
        'event["EventType"] in _AZURES',
        "tests/training/engine/test_notices.py::test_what_azure_announces_of_a_pause_or_of_another_machine_is_no_reason",
    ),
    Fault(
        "SLURM job is judged by an earlier session's status",
        "launch/slurm/job.py",
        'wrote = status.get("time") is not None and status["time"] != began["status_time"]',
        'wrote = status.get("time") is not None',
        "tests/launch/test_slurm_job.py::test_status_of_an_earlier_session_is_not_taken_for_this_ones",
    ),
    Fault(
        "kernel runs without progress use up the GPU hours of a week",
        "launch/kaggle/record.py",
        'came = (each.step or 0) if each.state == "complete" else 0',
        "came = each.step or 0",
        "tests/launch/test_kaggle_relay.py::test_progress_that_cannot_be_continued_does_not_count",
    ),
    Fault(
        "misspelt keys are ignored",
        "training/base/options.py",
        'extra="forbid"',
        'extra="ignore"',
        "tests/training/base/test_options.py::test_all_mistakes_are_reported_at_once",
    ),
    # What is said about the result.
    Fault(
        "cache a position too early",
        "training/models/gpt.py",
        "slots = cache.lengths\n",
        "slots = cache.lengths - 1\n",
        "tests/training/test_gpt.py::test_decoding_with_the_cache_equals_the_whole_forward_pass[rotary-layer]",
    ),
    Fault(
        "beam search without length penalty",
        "training/models/decoding.py",
        "score = log_probability / length_normaliser(len(ids) + 1, self.length_penalty)",
        "score = log_probability / length_normaliser(1, self.length_penalty)",
        "tests/training/evaluation/test_decoding.py::test_batches_give_what_a_plain_search_of_each_sentence_finds[gpt-5-3.0]",
    ),
    Fault(
        "finished beams go on",
        "training/models/decoding.py",
        "ranked.masked_fill(ending, -torch.inf).topk(",
        "ranked.topk(",
        "tests/training/evaluation/test_decoding.py::test_batches_give_what_a_plain_search_of_each_sentence_finds[seq2seq-5-3.0]",
    ),
    Fault(
        "BLEU of word tokens",
        "training/evaluation/translations/scores.py",
        "bleu = measure(bleu_of(language), translations, [[reference] for reference in references])",
        "bleu = measure(bleu_of(language), normalised, [[reference] for reference in normalised_references])",
        "tests/training/evaluation/test_scores.py::test_text_scores_are_sacrebleus_and_say_how_they_were_computed",
    ),
    Fault(
        "a handful of items proves anything",
        "training/evaluation/bootstrap.py",
        "return p if differing is None else max(p, min(1.0, 2.0 ** (1 - differing)))",
        "return p",
        "tests/training/evaluation/test_answer_scores.py::test_a_handful_of_items_shows_nothing_however_it_turns_out",
    ),
    Fault(
        "a script in a translation runs in the report",
        "training/report/templates.py",
        "autoescape=True,",
        "autoescape=False,",
        "tests/training/evaluation/test_report.py::test_hostile_text_stays_text_in_every_field",
    ),
    # What strangers may have made.
    Fault(
        "a planted link is followed",
        "training/base/files.py",
        '_HARDENED = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)',
        '_HARDENED = getattr(os, "O_NONBLOCK", 0)',
        "tests/training/engine/test_foreign_folders.py::test_what_is_written_in_place_is_a_plain_file[link]",
    ),
    Fault(
        "a temporary folder is taken as it lies there",
        "training/base/files.py",
        "                        remove(path)\n"
        "        with suppress(FileExistsError, FileNotFoundError):\n            path.mkdir()",
        "                        pass\n"
        "        with suppress(FileExistsError, FileNotFoundError):\n            path.mkdir(exist_ok=True)",
        "tests/training/engine/test_foreign_folders.py::test_a_temporary_name_is_made_anew_whatever_lies_there",
    ),
    Fault(
        "who has to wait for a folder does not",
        "training/base/files.py",
        "        lock(opened, wait=True)\n",
        "        lock(opened)\n",
        "tests/training/evaluation/test_evaluation.py::test_evaluations_of_one_run_may_begin_and_end_at_once",
    ),
    Fault(
        "offsets in prepared data are believed",
        "training/data/prepared.py",
        "            table.validate(full=True)\n",
        "",
        "tests/training/data/test_prepared.py::"
        "test_forged_content_is_refused_before_anything_is_read_by_it[text_beyond_its_buffer]",
    ),
    Fault(
        "half a base model is its fingerprint",
        "training/models/base_model.py",
        "digest.update(sha256_once(path).encode())",
        "digest.update(str(path.stat().st_size).encode())",
        "tests/training/models/test_base_model.py::test_every_byte_counts_in_the_fingerprint",
    ),
    Fault(
        "a line feed in an option ends SLURM's comment",
        "training/base/options.py",
        "    mistakes: list[str] = unprintable(argv)\n",
        "    mistakes: list[str] = []\n",
        "tests/training/engine/test_foreign_folders.py::test_definitions_that_are_no_names_are_refused",
    ),
    Fault(
        "names in a folder command the terminal",
        "training/base/console.py",
        "        print(harmless(text), flush=True)\n",
        "        print(text, flush=True)\n",
        "tests/training/engine/test_foreign_folders.py::test_what_is_printed_commands_no_terminal",
    ),
    # What leaves for other programs, and what is said to people.
    Fault(
        "GGUF turns a query with another number than its neighbour",
        "training/evaluation/exports/gguf_file.py",
        "    if heads is None:\n",
        "    if True:\n",
        "tests/training/evaluation/test_export_gguf.py::"
        "test_transformers_reads_the_same_model_and_tokenizer_out_of_the_file[llama]",
    ),
    Fault(
        "GGUF takes a control token for text",
        "training/evaluation/exports/gguf_file.py",
        "gguf.TokenType.CONTROL if is_control else gguf.TokenType.USER_DEFINED",
        "gguf.TokenType.USER_DEFINED",
        "tests/training/evaluation/test_export_gguf.py::"
        "test_the_tokenizer_stands_in_the_file_with_what_is_a_control_token",
    ),
    Fault(
        "GGUF says nothing of scaled positions",
        "training/evaluation/exports/gguf_file.py",
        'in ("linear", "yarn"):',
        'in ("linear",):',
        "tests/training/evaluation/test_export_gguf.py::"
        "test_everything_that_decides_how_it_is_computed_stands_in_the_file[qwen2-yarn]",
    ),
    Fault(
        "a character is shown in parts",
        "training/evaluation/chat_model/streaming.py",
        "self._decode(self._ids).rstrip(_PART)",
        "self._decode(self._ids)",
        "tests/training/evaluation/test_chat.py::test_a_character_of_several_tokens_appears_when_it_is_whole",
    ),
    Fault(
        "a new question is answered out of what was asked before",
        "training/evaluation/chat_model/streaming.py",
        "            self._cache.crop(-others)\n",
        "",
        "tests/training/evaluation/test_chat.py::test_what_the_model_has_read_and_said_is_not_read_again",
    ),
)


def misfit(fault: Fault, root: Path = ROOT) -> str | None:
    """Why the fault cannot be made in the tree at `root`, or its test is not there; None if all is well."""
    path = root / fault.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(fault.old) != 1:
        return f"the text that it replaces occurs {text.count(fault.old)} times in {fault.file}, not once"
    try:  # what cannot be imported makes every test fail, and shows nothing
        ast.parse(text.replace(fault.old, fault.new))
    except SyntaxError as error:
        return f"{fault.file} would be no Python ({error})"
    file, _, name = fault.test.partition("::")
    if not (root / file).is_file():
        return f"there is no {file}"
    functions = ast.parse((root / file).read_text(encoding="utf-8")).body
    if name.partition("[")[0] not in {each.name for each in functions if isinstance(each, ast.FunctionDef)}:
        return f"there is no test {fault.test}"
    return None


def copy_tree(target: Path) -> None:
    """Copies the working tree as git sees it, without what it ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in sorted(set(listed.stdout.decode().split("\0")) - {""}):
        if (ROOT / name).is_file():  # else it is deleted, but still tracked
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


@contextmanager
def made(fault: Fault, tree: Path) -> Iterator[None]:
    """The fault, for a while."""
    path = tree / fault.file
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content.decode().replace(fault.old, fault.new).encode())
    try:
        yield
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def import_libraries() -> None:
    """What the tests need and no fault touches: imported once, by the process that runs of pytest are forked from."""
    for library in ("pytest", "torch", "torch._dynamo", "transformers", "peft", "bitsandbytes"):
        importlib.import_module(library)


def run_tests(tree: Path, tests: Sequence[str], *, keep_bytecode: bool) -> tuple[int, str]:
    """pytest in the copy, as a process of its own: its exit status, and what it printed.

    Bytecode is known by size and second, so an edited file's must not be kept: it could be taken for the file's own.
    """
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            for number in (1, 2):
                os.dup2(output.fileno(), number)
            status = 3
            try:
                sys.dont_write_bytecode = not keep_bytecode
                status = _run_pytest(tree, tests)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, ended = os.waitpid(pid, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(ended), output.read().decode("utf-8", "replace")


def _run_pytest(tree: Path, tests: Sequence[str]) -> int:
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN_PACKAGES]:
        del sys.modules[name]  # the copy's are to be imported
    os.chdir(tree)
    sys.path[0] = str(tree)
    # Whoever runs this under pytest has variables of its own.
    for name in [name for name in os.environ if name.startswith(("PYTEST_", "PYTHONPATH"))]:
        del os.environ[name]
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if sys.dont_write_bytecode:
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return int(importlib.import_module("pytest").main(["-p", "no:cacheprovider", "-x", "-q", "-n", "0", *tests]))


def check_controls(tree: Path, faults: Sequence[Fault]) -> None:
    """Raises UserError unless the tests of `faults` pass where there is no fault."""
    tests = list(dict.fromkeys(fault.test for fault in faults))
    status, printed = run_tests(tree, tests, keep_bytecode=True)
    if status or " skipped" in printed:
        raise UserError(f"without a fault, not all of the {len(tests)} tests pass:\n{printed}")


def is_caught(fault: Fault, tree: Path) -> tuple[bool, str]:
    """Whether the fault's test fails, and what pytest printed."""
    with made(fault, tree):
        status, printed = run_tests(tree, [fault.test], keep_bytecode=False)
    return status == TESTS_FAILED, printed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of faults (default: all)")
    names = parser.parse_args(argv).names
    unknown = set(names) - {fault.name for fault in FAULTS}
    if unknown:
        known = "\n".join(fault.name for fault in FAULTS)
        raise UserError(f"there is no fault called {' or '.join(sorted(unknown))}; there are\n{known}")
    chosen = [fault for fault in FAULTS if not names or fault.name in names]
    fitting = [fault for fault in chosen if misfit(fault) is None]
    for fault in chosen:
        if fault not in fitting:
            say(f"does not fit  {fault.name}: {misfit(fault)}")
    if not fitting:
        return 1
    import_libraries()
    missed = []
    with tempfile.TemporaryDirectory(prefix="relay-mutations-") as folder:
        copy_tree(Path(folder))
        began = time.monotonic()
        check_controls(Path(folder), fitting)
        say(f"without a fault all their tests pass ({time.monotonic() - began:.0f} s)")
        for fault in fitting:
            began = time.monotonic()
            caught, printed = is_caught(fault, Path(folder))
            say(f"{'caught' if caught else 'MISSED'} {time.monotonic() - began:5.1f} s  {fault.name}: {fault.test}")
            if not caught:
                missed.append(fault)
                say("\n".join(f"    {line}" for line in printed.splitlines()[-15:]))
    say(f"{len(fitting) - len(missed)} of {len(chosen)} faults caught")
    return 0 if not missed and len(fitting) == len(chosen) else 1


if __name__ == "__main__":
    run_main(main)
