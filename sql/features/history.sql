-- Each user's latest {{ length }} impressions in the daily histories, strictly before
-- day {{ as_of }} (days since 1970), the latest first.
select
    user_id
    {%- for column in columns %},
    array_agg(
        "last_{{ column }}"
        order by "day" desc, "timestamp" desc, item_id asc
        limit {{ length }}
    ) as "{{ prefix }}_{{ column }}"
    {%- endfor %}
from daily
where "day" < {{ as_of }} and "day" >= {{ as_of - longest }}
group by user_id
