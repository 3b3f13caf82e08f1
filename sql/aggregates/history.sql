-- Each user's latest {{ length }} impressions of each day with a positive {{ signal }}.
with positive as (
    select
        "day",
        user_id,
        item_id,
        "timestamp",
        {%- for column in columns %}
        "{{ column }}" as "last_{{ column }}",
        {%- endfor %}
        row_number() over (
            partition by user_id, "day"
            order by "timestamp" desc, item_id asc
        ) as recency
    from events
    where "{{ signal }}" > 0
)

select
    "day",
    user_id,
    item_id,
    "timestamp"
    {%- for column in columns %},
    "last_{{ column }}"
    {%- endfor %}
from positive
where recency <= {{ length }}
