/** What the memory map says: numbers of a plan as sentences of a language. */

import type { Translate, Word } from '../../i18n'
import type { Fill } from '../../theme'
import { formatBandwidth, formatBytes, formatNumber, formatPercent, formatSeconds } from '../../units'
import type { BlockState, PlanState, TierState } from '../../wire'
import {
  BLOCK_FILLS, computesOnGpu, fillOfBlock, partsOf, type Purpose, PURPOSES, sumOf, tightestTier, trafficFrom, weightShares,
} from './facts'

/** Seconds of waiting, copying and computing of one block in the newest sweep. */
export type Times = readonly [number, number, number]

const PURPOSE_WORDS: Record<Purpose, Word> = {
  split: 'mapSplit',
  kept: 'mapKept',
  draft: 'mapDraft',
  slots: 'mapSlots',
  kv_cache: 'mapKvCache',
  activations: 'mapActivations',
  buffers: 'mapBuffers',
  spare: 'mapSpare',
  beyond: 'mapBeyond',
  reserve: 'mapReserve',
  other: 'mapOther',
}
const SHARE_WORDS: Partial<Record<Fill, Word>> = {
  gpu: 'mapShareGpu',
  'looked-up': 'mapShareLookedUp',
  'ram-streamed': 'mapShareStreamed',
  ram: 'mapShareCpu',
  kept: 'mapShareKept',
  disk: 'mapShareDisk',
}

/** `"RAM"`, `"Disk"`, `"cuda:0"`. */
export function deviceTitle(t: Translate, device: string): string {
  if (device === 'cpu') return t('ram')
  return device === 'disk' ? t('disk') : device
}

/** `"in RAM"`, `"on disk"`, `"on cuda:0"`. */
export function onDevice(t: Translate, device: string): string {
  if (device === 'cpu') return t('mapInRam')
  return device === 'disk' ? t('mapOnDisk') : t('mapOnDevice', { device })
}

/** Who computes: `"the CPU"`, `"cuda:0"`. */
export function processor(t: Translate, device: string): string {
  return device === 'cpu' ? t('mapTheCpu') : device
}

export function purposeWords(t: Translate, purpose: Purpose): string {
  return t(PURPOSE_WORDS[purpose])
}

/** What a loaded model uses memory for; an engine may have purposes that this view does not know. */
export function heldWords(t: Translate, purpose: string): string {
  if (purpose === 'weights') return t('mapWeights')
  return PURPOSES.some(known => known === purpose) ? purposeWords(t, purpose as Purpose) : purpose
}

export function partWords(t: Translate, purpose: Purpose, bytes: number, device: string): string {
  return t('mapPart', { purpose: purposeWords(t, purpose), size: formatBytes(bytes), where: onDevice(t, device) })
}

/** Everything in a tier beside blocks, for one focus. */
export function partsWords(t: Translate, tier: TierState): string[] {
  return partsOf(tier).map(({ purpose, bytes }) => `${purposeWords(t, purpose)} ${formatBytes(bytes)}`)
}

/** What the model is, after its name. */
export function headline(t: Translate, plan: PlanState): string {
  const layers = plan.blocks.filter(block => block.kind === 'decoder' || block.kind === 'encoder').length
  const experts = Math.max(0, ...plan.blocks.map(block => block.experts))
  const active = Math.max(0, ...plan.blocks.map(block => block.active_experts))
  const { dtype, quantization } = plan
  return [
    quantization ? t('mapQuantized', { quantization, dtype }) : dtype,
    formatBytes(plan.bytes),
    t(layers === 1 ? 'mapLayer' : 'mapLayers', { count: formatNumber(layers) }),
    ...(experts ? [t('mapExpertsActive', { experts: formatNumber(experts), active: formatNumber(active) })] : []),
    t('mapContext', { count: formatNumber(plan.context_length) }),
  ].join(' · ')
}

/** `"✓ fits, 1.1 GiB to spare on cuda:0"`. */
export function verdict(t: Translate, plan: PlanState): string {
  if (!plan.fits) return t('mapDoesNotFit')
  const tight = tightestTier(plan)
  if (!tight) return t('mapFits')
  return t('mapFitsSpare', { size: formatBytes(tight.spare), where: onDevice(t, tight.device) })
}

/** `"60 % GPU · 25 % RAM streamed · 15 % RAM on the CPU"`. */
export function placementWords(t: Translate, plan: PlanState): string {
  const isOnGpu = computesOnGpu(plan)
  return [...weightShares(plan)]
    .map(([fill, percent]) => {
      const word = fill === 'ram' && !isOnGpu ? 'ram' : SHARE_WORDS[fill]
      return t('mapPercent', { percent: formatPercent(percent / 100), what: word ? t(word) : '?' })
    })
    .join(' · ')
}

/** `"38.1 GiB to cuda:0 for every token · link 25.0 GB/s"`; empty where nothing moves. */
export function trafficWords(t: Translate, plan: PlanState, device: string): string {
  const traffic = trafficFrom(plan, device)
  if (!traffic) return ''
  const { targets, bytesPerS } = traffic
  const target = targets.length > 1 ? t('mapGpus', { count: targets.length }) : deviceTitle(t, targets[0] ?? '')
  const words = t('mapMoves', { size: formatBytes(traffic.bytes), target })
  if (!bytesPerS) return words
  const over = targets.length > 1 && device !== 'disk' ? 'mapLinks' : 'mapLink'
  return `${words} · ${t(over, { rate: formatBandwidth(bytesPerS) })}`
}

/** What is left in a tier, or lacks; and what a loaded model uses now: bytes by purpose. */
export function leftWords(t: Translate, plan: PlanState, tier: TierState, held: Record<string, number>): string {
  const now = sumOf(held)
  const words = spareWords(t, plan, tier)
  return now ? `${words} · ${t('mapNow', { size: formatBytes(now) })}` : words
}

function spareWords(t: Translate, plan: PlanState, tier: TierState): string {
  if (tier.spare < 0) return t('mapLacks', { size: formatBytes(-tier.spare) })
  if (tier.kind !== 'disk') return t('mapToSpare', { size: formatBytes(tier.spare) })
  if (!tier.planned) return t('mapNothingThere')
  const used = plan.blocks.filter(block => block.home === tier.device && block.way !== 'idle')
  if (!used.length) return t('mapNotRead')
  if (used.every(block => block.way === 'looked-up')) return t('mapLookedUpInFiles')
  return t(plan.mapped ? 'mapInPageCache' : 'mapReadFromFiles')
}

/** `"RTX 4090"`, `"M2 Max, unified memory"`. */
export function tierName(t: Translate, tier: TierState): string {
  return tier.unified ? t('mapUnified', { name: tier.name }) : tier.name
}

/** `"24.0 GiB"`, and what is free where the bar does not show it. */
export function tierSize(t: Translate, tier: TierState): string {
  const total = formatBytes(tier.total)
  return tier.is_whole ? total : t('mapTotalFree', { total, size: formatBytes(tier.free) })
}

/** What happens to a block in every sweep: `"streams to cuda:0"`. */
function doesWords(t: Translate, plan: PlanState, block: BlockState): string {
  const target = processor(t, block.compute)
  switch (block.way) {
    case 'kept':
      return block.compute === 'cpu' ? t('mapDoesKeptCpu') : t('mapDoesKept', { target })
    case 'read':
      return plan.mapped ? t('mapDoesMapped') : t('mapDoesRead', { target })
    case 'split':
      return t('mapDoesSplit', { target })
    case 'cpu':
      return t('mapDoesCpu')
    case 'idle':
      return t('mapIdle')
    case 'looked-up':
      return t('mapDoesLookedUp', { target })
    case 'streamed':
      return t('mapDoesStreamed', { target })
    default:
      return t('mapDoesResident')
  }
}

/** Everything that is known of a block, a line each; the first is its name. */
export function blockLines(t: Translate, plan: PlanState, block: BlockState, times?: Times): string[] {
  const separator = t('mapComma')
  return [
    block.label,
    `${block.bytes ? formatBytes(block.bytes) : t('mapNoBytes')} · ${block.dtype}`,
    `${onDevice(t, block.home)}${separator}${doesWords(t, plan, block)}`,
    ...(block.prefill ? [t(block.way === 'split' ? 'mapExpertsVisit' : 'mapVisits', { target: processor(t, block.prefill), tokens: plan.long_sweep })] : []),
    ...(block.experts ? [t('mapExpertsToken', { experts: block.experts, active: block.active_experts })] : []),
    ...(block.cache_bytes
      ? [t('mapBlockCache', { size: formatBytes(block.cache_bytes), where: onDevice(t, block.compute) })]
      : []),
    ...(block.tied_to.length ? [t('mapTied', { labels: block.tied_to.join(separator) })] : []),
    ...(times ? [timesWords(t, times)] : []),
  ]
}

/** `"last sweep: wait 0 ms, copy 37 ms, compute 7 ms"`. */
export function timesWords(t: Translate, [wait, copy, compute]: Times): string {
  return t('mapTimes', {
    wait: formatSeconds(wait), copy: formatSeconds(copy), compute: formatSeconds(compute),
  })
}

/** What each fill of blocks stands for, of those a plan has, fastest first. */
export function fillWords(t: Translate, plan: PlanState): [Fill, string][] {
  const used = new Set(plan.blocks.map(fillOfBlock))
  const words: Record<(typeof BLOCK_FILLS)[number], Word> = {
    gpu: 'mapLegendGpu',
    'looked-up': 'mapLegendLookedUp',
    'ram-streamed': 'mapLegendStreamed',
    ram: 'mapLegendCpu',
    kept: 'mapLegendKept',
    disk: plan.mapped ? 'mapLegendMapped' : 'mapLegendDisk',
    idle: 'mapIdle',
  }
  return BLOCK_FILLS.filter(fill => used.has(fill)).map(fill => [fill, t(words[fill])])
}

/** Sign of the strip → what it stands for, in the order of the tiers. */
export function signWords(t: Translate, plan: PlanState, signs: Map<string, string>): string[] {
  const order = plan.tiers.map(tier => tier.device)
  const streams = plan.blocks.some(block => block.way === 'streamed')
  const names: Record<string, string> = {
    C: t('mapSignCpu'),
    S: t('mapSignSplit'),
    K: t('mapSignKept'),
    L: lookedUpWords(t, plan),
    R: streams ? t('mapSignStreamed') : t('ram'),
    '–': t('mapIdle'),
  }
  return [...signs]
    .sort(([, a], [, b]) => order.indexOf(a) - order.indexOf(b))
    .map(([sign, device]) => `${sign} = ${names[sign] ?? deviceTitle(t, device)}`)
}

/** Where tables are of which rows are looked up: `"RAM, looked up"`. */
function lookedUpWords(t: Translate, plan: PlanState): string {
  const [device = '', ...others] = new Set(plan.blocks.filter(block => block.way === 'looked-up').map(block => block.home))
  return others.length ? t('mapSignLookedUpBoth') : t('mapSignLookedUp', { device: deviceTitle(t, device) })
}
