-- Number of present labels of each objective, their sum, minimum and maximum, over examples.
select
    {%- for objective in objectives %}
    count("label_{{ objective }}") as "{{ objective }}_count",
    sum("label_{{ objective }}") as "{{ objective }}_sum",
    min("label_{{ objective }}") as "{{ objective }}_min",
    max("label_{{ objective }}") as "{{ objective }}_max",
    {%- endfor %}
    count(*) as example_count
from examples
