-- Each user's latest {{ length }} impressions of one day with a positive {{ signal }}.
with positive as (
    select
        user_id,
        item_id,
        "timestamp",
        {%- for column in columns %}
        "{{ column }}" as "last_{{ column }}",
        {%- endfor %}
        row_number() over (
            partition by user_id
            order by "timestamp" desc, item_id asc
        ) as recency
    from events
    where "{{ signal }}" > 0
)

select
    user_id,
    item_id,
    "timestamp"
    {%- for column in columns %},
    "last_{{ column }}"
    {%- endfor %}
from positive
where recency <= {{ length }}
