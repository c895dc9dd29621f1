// Columns of the table of results.

/** Fields by theme; [field, head, what it is, kind of number]. */
const THEMES = {
  overview: [
    "Overview",
    [
      ["test_accuracy_ema", "EMA %", "test accuracy of the averaged weights", "percent"],
      ["test_nll", "NLL", "negative log-likelihood on the test images, in nats", "plain"],
      ["test_ece", "ECE", "expected calibration error, 15 bins", "plain"],
      ["macs", "MACs", "multiply-accumulates of one image", "millions"],
      ["num_parameters", "Parameters", "of the student", "count"],
    ],
  ],
  branches: [
    "Branches",
    [
      ["test_mean_branch_accuracy", "Mean branch %", "mean of the branches' accuracies", "percent"],
      ["test_best_branch_accuracy", "Best branch %", "accuracy of the best branch", "percent"],
      ["test_gain_over_mean_branch", "Gain over mean", "ensemble minus mean branch, in points", "points"],
      ["test_gain_over_best_branch", "Gain over best", "ensemble minus best branch, in points", "points"],
      ["test_oracle_accuracy", "Oracle %", "images that at least one branch gets right", "percent"],
    ],
  ],
  diversity: [
    "Heterogeneity",
    [
      ["test_disagreement", "Disagreement", "share of images on which two branches differ, mean over pairs", "plain"],
      ["test_ambiguity", "Ambiguity", "mean branch NLL minus NLL of their geometric mean, in nats", "plain"],
      ["test_pairwise_js", "JS", "Jensen-Shannon divergence of the branches, in nats", "plain"],
      ["test_q_statistic", "Q", "Yule's Q of correct answers, mean over pairs: lower is more diverse", "plain"],
      ["test_error_correlation", "Error corr.", "correlation of correct answers, mean over pairs", "plain"],
      [
        "test_own_teacher_cka_margin",
        "Own − other CKA",
        "CKA to the own teacher minus mean CKA to the others",
        "plain",
      ],
    ],
  ],
  calibration: [
    "Calibration",
    [
      ["test_nll", "NLL", "negative log-likelihood, in nats", "plain"],
      ["test_nll_calibrated", "NLL calibrated", "after temperature scaling on the validation split", "plain"],
      ["test_ece", "ECE", "expected calibration error, 15 bins", "plain"],
      ["test_ece_calibrated", "ECE calibrated", "after temperature scaling on the validation split", "plain"],
      ["test_brier", "Brier", "in [0, 2]", "plain"],
      ["calibration_temperature", "Temperature", "fitted on the validation split", "plain"],
    ],
  ],
  fidelity: [
    "Fidelity to teachers",
    [
      ["test_teacher_agreement", "Agreement %", "same class as the teacher ensemble", "percent"],
      ["test_teacher_kl", "KL", "of teacher ensemble and student, in nats", "plain"],
      [
        "test_own_teacher_agreement_margin",
        "Own − other",
        "agreement with the own teacher minus mean of the others, in points",
        "points",
      ],
    ],
  ],
  generalisation: [
    "Robustness, generalisation",
    [
      ["corruption_mce", "Corruption error %", "mean over corruptions and severities", "percent"],
      ["gap_accuracy", "Accuracy gap", "training minus test accuracy, in points", "points"],
      ["gap_nll", "NLL gap", "test minus training NLL, in nats", "plain"],
      ["sharpness_sam", "SAM sharpness", "rise of the loss at radius 0.05", "plain"],
      ["sharpness_adaptive", "Adaptive sharpness", "rise of the loss at adaptive radius 0.5", "plain"],
      ["loss_rise_at_half", "Rise at ½", "rise of the loss half way along filter-normalised directions", "plain"],
    ],
  ],
  cost: [
    "Cost",
    [
      ["num_parameters", "Parameters", "of the student", "count"],
      ["macs", "MACs", "multiply-accumulates of one image", "millions"],
      ["deployed_bytes", "Size", "of the deployed form on disk", "bytes"],
      ["latency_ms_batch1", "ms, batch 1", "latency of the deployed form", "milliseconds"],
      ["latency_ms_batch128", "ms, batch 128", "latency of the deployed form", "milliseconds"],
      ["train_seconds", "Training s", "depends on what else the machine did", "seconds"],
    ],
  ],
};
