rule train_ddpm:
    """The unconditional diffusion model, trained or pretrained, as a diffusers pipeline folder."""
    input:
        arrays,
        manifest=manifest,
    output:
        "models/{experiment}/ddpm/model_index.json",
        "models/{experiment}/ddpm/scheduler/scheduler_config.json",
        "models/{experiment}/ddpm/unet/config.json",
        "models/{experiment}/ddpm/data_mean.npy",
        "models/{experiment}/ddpm/unet/diffusion_pytorch_model.safetensors",
        "models/{experiment}/ddpm/training.csv",
        "models/{experiment}/ddpm/samples.png",
        record="models/{experiment}/ddpm/training.json",
    log:
        "logs/{experiment}/train_ddpm.log",
    benchmark:
        "benchmarks/{experiment}/train_ddpm.tsv"
    priority: 10  # the longest job, which most others wait for
    threads: asked(lambda job: job.training_threads)
    resources:
        gpu=asked(lambda job: job.training_gpus),
        mem_mb=memory(8000),
        runtime=4320,  # a retry goes on from the last checkpoint
    params:
        config=settings_file("train_ddpm"),
        data=subpath(input.manifest, parent=True),
        folder=subpath(output.record, parent=True),
        options=files(lambda one, wildcards: " ".join(["--preview", *one.preview()])),
    shell:
        "nrcg train-ddpm --config {params.config} --data {params.data} --threads {threads} --gpus {resources.gpu}"
        " {params.options} --out {params.folder} > {log} 2>&1"


rule train_classifier:
    """One classifier: robust, non_robust or the judge."""
    input:
        arrays,
        manifest=manifest,
    output:
        "models/{experiment}/classifiers/{role}/model.safetensors",
        "models/{experiment}/classifiers/{role}/training.csv",
        "models/{experiment}/classifiers/{role}/accuracy_over_t.csv",
        record="models/{experiment}/classifiers/{role}/config.json",
    log:
        "logs/{experiment}/train_{role}.log",
    benchmark:
        "benchmarks/{experiment}/train_{role}.tsv"
    priority: 7  # before a grid of objectives
    threads: 1
    resources:
        gpu=asked(lambda job: job.gpus),
        mem_mb=memory(6000),
        runtime=lambda wildcards, attempt: attempt * 360,
    params:
        config=settings_file("train_classifier", "role"),
        data=subpath(input.manifest, parent=True),
        folder=subpath(output.record, parent=True),
    shell:
        "nrcg train-classifier --config {params.config} --role {wildcards.role} --data {params.data}"
        " --threads {threads} --out {params.folder} > {log} 2>&1"
