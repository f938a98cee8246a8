rule train_ddpm:
    """The unconditional diffusion model, trained or pretrained, as a diffusers pipeline folder."""
    input:
        dataset_files,
    output:
        "models/{experiment}/ddpm/model_index.json",
        "models/{experiment}/ddpm/scheduler/scheduler_config.json",
        "models/{experiment}/ddpm/unet/config.json",
        "models/{experiment}/ddpm/data_mean.npy",
        "models/{experiment}/ddpm/unet/diffusion_pytorch_model.safetensors",
        "models/{experiment}/ddpm/training.json",
        "models/{experiment}/ddpm/training.csv",
        "models/{experiment}/ddpm/samples.png",
    log:
        "logs/{experiment}/train_ddpm.log",
    benchmark:
        "logs/{experiment}/train_ddpm.tsv"
    conda:
        "../envs/nrcg.yaml"
    threads: 16
    resources:
        gpu=training_gpus,
        mem_mb=memory(8000),
        runtime=4320,  # a retry goes on from the last checkpoint
    params:
        config=settings_file("train_ddpm"),
        data=data_folder,
        folder=folder("models/{experiment}/ddpm"),
    shell:
        "nrcg train-ddpm --config {params.config} --data {params.data} --threads {threads}"
        " --gpus {resources.gpu} --out {params.folder} > {log} 2>&1"


rule train_classifier:
    """One classifier: robust, non_robust or the judge."""
    input:
        dataset_files,
    output:
        "models/{experiment}/classifiers/{role}/model.safetensors",
        "models/{experiment}/classifiers/{role}/config.json",
        "models/{experiment}/classifiers/{role}/training.csv",
        "models/{experiment}/classifiers/{role}/accuracy_over_t.csv",
    log:
        "logs/{experiment}/train_{role}.log",
    benchmark:
        "logs/{experiment}/train_{role}.tsv"
    conda:
        "../envs/nrcg.yaml"
    threads: 1
    resources:
        gpu=gpus,
        mem_mb=memory(6000),
        runtime=minutes(360),
    params:
        config=settings_file("train_classifier", "role"),
        data=data_folder,
        folder=folder("models/{experiment}/classifiers/{role}"),
    shell:
        "nrcg train-classifier --config {params.config} --role {wildcards.role} --data {params.data}"
        " --threads {threads} --out {params.folder} > {log} 2>&1"
