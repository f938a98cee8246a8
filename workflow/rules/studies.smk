# What an experiment can ask for beside the paper's comparison: `likelihood`, `objectives` and `explain` of its block.
rule likelihood:
    """One shard of the validation images' bits per dimension."""
    input:
        arrays,
        ancient("models/{experiment}/ddpm/unet/diffusion_pytorch_model.safetensors"),
        manifest=manifest,
        ddpm="models/{experiment}/ddpm/training.json",
    output:
        "results/{experiment}/likelihood/shard{shard}.npz",
    log:
        "logs/{experiment}/likelihood_shard{shard}.log",
    benchmark:
        "benchmarks/{experiment}/likelihood_shard{shard}.tsv"
    threads: 1
    resources:
        gpu=asked(lambda job: job.gpus),
        mem_mb=growing(lambda job, wildcards: job.guided_mb("likelihood")),
        runtime=growing(lambda job, wildcards: job.likelihood_minutes()),
    params:
        config=settings_file("likelihood"),
        num_images=files(lambda one, wildcards: one.likelihood_size(int(wildcards.shard))),  # as for samples
        data=subpath(input.manifest, parent=True),
        ddpm=subpath(input.ddpm, parent=True),
    shell:
        "nrcg likelihood --config {params.config} --shard {wildcards.shard} --data {params.data} --ddpm {params.ddpm}"
        " --threads {threads} --out {output} > {log} 2>&1"


rule likelihood_table:
    """Bits per dimension by t and by image, and their figure."""
    input:
        files(lambda one, wildcards: one.likelihood_shards()),
    output:
        expand("results/{{experiment}}/likelihood/{name}", name=LIKELIHOOD_FILES[:3]),
        "results/{experiment}/likelihood/bits_per_dim.svg",
        figure=report(
            "results/{experiment}/likelihood/bits_per_dim.png",
            caption="../report/bits_per_dim.rst",
            category="{experiment}",
        ),
    log:
        "logs/{experiment}/likelihood_table.log",
    benchmark:
        "benchmarks/{experiment}/likelihood_table.tsv"
    localrule: True
    threads: 1
    resources:
        mem_mb=memory(1000),
        runtime=10,
    params:
        config=settings_file("likelihood"),
        folder=subpath(output.figure, parent=True),
    shell:
        "nrcg likelihood-table --config {params.config} --shards {input} --out {params.folder} > {log} 2>&1"


use rule train_ddpm as train_objective with:
    output:
        "models/{experiment}/objectives/{objective}/model_index.json",
        "models/{experiment}/objectives/{objective}/scheduler/scheduler_config.json",
        "models/{experiment}/objectives/{objective}/unet/config.json",
        "models/{experiment}/objectives/{objective}/data_mean.npy",
        "models/{experiment}/objectives/{objective}/unet/diffusion_pytorch_model.safetensors",
        "models/{experiment}/objectives/{objective}/training.csv",
        "models/{experiment}/objectives/{objective}/samples.png",
        record="models/{experiment}/objectives/{objective}/training.json",
    log:
        "logs/{experiment}/objectives/train_{objective}.log",
    benchmark:
        "benchmarks/{experiment}/objectives/train_{objective}.tsv"
    priority: 5  # what is measured waits for the classifiers
    params:
        config=settings_file("train_ddpm", "objective"),
        data=subpath(input.manifest, parent=True),
        folder=subpath(output.record, parent=True),
        options=lambda wildcards: f"--objective {wildcards.objective}",


rule objective:
    """What a model trained by one objective of the grid is good for."""
    input:
        arrays,
        ancient("models/{experiment}/objectives/{objective}/unet/diffusion_pytorch_model.safetensors"),
        ancient(expand("models/{{experiment}}/classifiers/{role}/model.safetensors", role=ROLES)),
        "results/{experiment}/reference.json",
        expand("models/{{experiment}}/classifiers/{role}/config.json", role=("robust", "non_robust")),
        manifest=manifest,
        ddpm="models/{experiment}/objectives/{objective}/training.json",
        judge="models/{experiment}/classifiers/judge/config.json",
    output:
        "results/{experiment}/objectives/{objective}.csv",
        "results/{experiment}/objectives/{objective}.npz",
        record="results/{experiment}/objectives/{objective}.json",
    log:
        "logs/{experiment}/objectives/{objective}.log",
    benchmark:
        "benchmarks/{experiment}/objectives/{objective}.tsv"
    threads: 1
    resources:
        gpu=asked(lambda job: job.gpus),
        mem_mb=growing(lambda job, wildcards: job.guided_mb("sampling")),
        runtime=growing(lambda job, wildcards: job.objective_minutes()),
    params:
        config=settings_file("objective", "objective"),
        data=subpath(input.manifest, parent=True),
        ddpm=subpath(input.ddpm, parent=True),
        classifiers=subpath(input.judge, ancestor=2),
        features=protocols,
    shell:
        "nrcg objective --config {params.config} --objective {wildcards.objective} --data {params.data}"
        " --ddpm {params.ddpm} --classifiers {params.classifiers} --threads {threads} --out {output.record}"
        " > {log} 2>&1"


rule objectives_table:
    """The grid of objectives in one table, with figures."""
    input:
        files(lambda one, wildcards: one.objective_records()),
    output:
        "results/{experiment}/objectives/objectives.csv",
        "results/{experiment}/objectives/objectives.svg",
        report(
            "results/{experiment}/objectives/samples.png",
            caption="../report/objective_samples.rst",
            category="{experiment}",
        ),
        figure=report(
            "results/{experiment}/objectives/objectives.png",
            caption="../report/objectives.rst",
            category="{experiment}",
        ),
    log:
        "logs/{experiment}/objectives/table.log",
    benchmark:
        "benchmarks/{experiment}/objectives/table.tsv"
    localrule: True
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        folder=subpath(output.figure, parent=True),
    shell:
        "nrcg objectives-table --records {input} --out {params.folder} > {log} 2>&1"


rule explain:
    """One shard of the explanations of one way to explain."""
    input:
        arrays,
        ancient("models/{experiment}/ddpm/unet/diffusion_pytorch_model.safetensors"),
        ancient(expand("models/{{experiment}}/classifiers/{role}/model.safetensors", role=ROLES[:2])),
        "models/{experiment}/classifiers/robust/config.json",
        manifest=manifest,
        ddpm="models/{experiment}/ddpm/training.json",
        guide="models/{experiment}/classifiers/non_robust/config.json",
    output:
        "results/{experiment}/explanations/{explainer}/shard{shard}.npz",
    log:
        "logs/{experiment}/explain/{explainer}_shard{shard}.log",
    benchmark:
        "benchmarks/{experiment}/explain/{explainer}_shard{shard}.tsv"
    group:
        "{experiment}_{explainer}"
    threads: 1
    resources:
        gpu=asked(lambda job: job.gpus),
        mem_mb=growing(lambda job, wildcards: job.guided_mb("explain")),
        runtime=growing(lambda job, wildcards: job.explain_minutes()),
    params:
        config=settings_file("explain", "explainer"),
        data=subpath(input.manifest, parent=True),
        ddpm=subpath(input.ddpm, parent=True),
        classifiers=subpath(input.guide, ancestor=2),
    shell:
        "nrcg explain-shard --config {params.config} --explainer {wildcards.explainer} --shard {wildcards.shard}"
        " --data {params.data} --ddpm {params.ddpm} --classifiers {params.classifiers} --threads {threads}"
        " --out {output} > {log} 2>&1"


rule evaluate_explanations:
    """Metrics of one way to explain, by the guide and by the classifiers that did not guide."""
    input:
        arrays,
        ancient("models/{experiment}/ddpm/unet/diffusion_pytorch_model.safetensors"),
        ancient(expand("models/{{experiment}}/classifiers/{role}/model.safetensors", role=ROLES)),
        "results/{experiment}/reference.json",
        expand("models/{{experiment}}/classifiers/{role}/config.json", role=("robust", "non_robust")),
        shards=files(lambda one, wildcards: one.explanation_shards(wildcards.explainer)),
        manifest=manifest,
        ddpm="models/{experiment}/ddpm/training.json",
        judge="models/{experiment}/classifiers/judge/config.json",
    output:
        "results/{experiment}/explanations/{explainer}.npz",
        table="results/{experiment}/explanations/{explainer}.csv",
    log:
        "logs/{experiment}/explain/evaluate_{explainer}.log",
    benchmark:
        "benchmarks/{experiment}/explain/evaluate_{explainer}.tsv"
    threads: asked(lambda job: job.feature_threads)
    resources:
        gpu=asked(lambda job: job.gpus),
        mem_mb=memory(4000),
        runtime=lambda wildcards, attempt: attempt * 120,
    params:
        config=settings_file("evaluate_explanations", "explainer"),
        data=subpath(input.manifest, parent=True),
        ddpm=subpath(input.ddpm, parent=True),
        classifiers=subpath(input.judge, ancestor=2),
        features=protocols,
    shell:
        "nrcg evaluate-explanations --config {params.config} --explainer {wildcards.explainer} --shards {input.shards}"
        " --data {params.data} --ddpm {params.ddpm} --classifiers {params.classifiers} --threads {threads}"
        " --out {output.table} > {log} 2>&1"


rule explanations_table:
    """Every way to explain in one table, with figures."""
    input:
        files(lambda one, wildcards: one.explainer_tables()),
    output:
        "results/{experiment}/explanations/explanations.csv",
        "results/{experiment}/explanations/explanations.svg",
        report(
            "results/{experiment}/explanations/pictures.png",
            caption="../report/explanation_pictures.rst",
            category="{experiment}",
        ),
        figure=report(
            "results/{experiment}/explanations/explanations.png",
            caption="../report/explanations.rst",
            category="{experiment}",
        ),
    log:
        "logs/{experiment}/explain/table.log",
    benchmark:
        "benchmarks/{experiment}/explain/table.tsv"
    localrule: True
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        folder=subpath(output.figure, parent=True),
    shell:
        "nrcg explanations-table --tables {input} --out {params.folder} > {log} 2>&1"
