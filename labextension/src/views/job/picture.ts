/** The tiers of a plan as bars at one scale, a cell for each block, that fill while a job is at work. */

import { h, replace, setText } from '../../dom'
import type { Translate } from '../../i18n'
import type { Fill } from '../../theme'
import { formatBytes } from '../../units'
import type { BlockState, PlanState, TierState } from '../../wire'
import type { BlockProgress } from './blocks'

const FILL_OF_WAY: Record<BlockState['way'], Fill> = {
  resident: 'gpu', streamed: 'ram-streamed', split: 'ram', cpu: 'ram', kept: 'kept', read: 'disk', 'looked-up': 'looked-up',
  idle: 'idle',
}

interface Row {
  blocks: BlockState[]
  cells: HTMLElement[]
  count: HTMLElement
  size: string
}

export class BlockPicture {
  readonly element: HTMLElement
  private rows: Row[] = []

  constructor(private readonly t: Translate) {
    this.element = h('div', { class: 'job-tiers', role: 'group', 'aria-label': t('jobBlocksLabel'), hidden: true })
  }

  /** Draw the tiers that get blocks. */
  setPlan(plan: PlanState | null): void {
    const tiers = plan ? plan.tiers.filter(tier => plan.blocks.some(block => block.home === tier.device)) : []
    const held = tiers.map(tier => plan?.blocks.filter(block => block.home === tier.device) ?? [])
    const scale = Math.max(1, ...held.map(bytesOf))
    this.rows = []
    this.element.hidden = !tiers.length
    replace(this.element, ...tiers.map((tier, i) => this.tier(tier, held[i] ?? [], scale)))
  }

  /** Show what is done; only what changed is touched. */
  show(progress: BlockProgress): void {
    for (const { blocks, cells, count, size } of this.rows) {
      let done = 0
      for (const [i, { label }] of blocks.entries()) {
        const isDone = progress.done.has(label)
        done += isDone ? 1 : 0
        cells[i]?.classList.toggle('done', isDone)
        cells[i]?.classList.toggle('now', progress.current === label)
      }
      setText(count, this.t('jobTierCount', { done, count: blocks.length, size }))
    }
  }

  private tier(tier: TierState, blocks: BlockState[], scale: number): HTMLElement {
    const row: Row = {
      blocks, cells: blocks.map(cell), count: h('span', { class: 'job-count num muted' }), size: formatBytes(bytesOf(blocks)),
    }
    this.rows.push(row)
    const name = h('span', { class: 'job-name' }, h('b', {}, this.title(tier)), ' ', h('span', { class: 'muted' }, tier.name))
    const width = `${((100 * bytesOf(blocks)) / scale).toFixed(2)}%`
    const bar = h('div', { class: 'job-bar', '--width': width, 'aria-hidden': 'true' }, ...row.cells)
    return h('div', { class: 'job-tier' }, h('div', { class: 'job-line' }, name, row.count), bar)
  }

  private title(tier: TierState): string {
    if (tier.kind === 'cpu') return this.t('ram')
    return tier.kind === 'disk' && tier.device === 'disk' ? this.t('disk') : tier.device
  }
}

function cell(block: BlockState): HTMLElement {
  const inside = h('span', { class: `fill-${FILL_OF_WAY[block.way] ?? 'other'}` })
  return h('span', { class: 'job-cell', 'data-label': block.label, title: block.label, '--bytes': String(Math.max(1, block.bytes)) }, inside)
}

function bytesOf(blocks: BlockState[]): number {
  return blocks.reduce((sum, block) => sum + block.bytes, 0)
}
